"""Takes safetensors files apart and reassembles them byte by byte, valid or not."""

import json
import math
import pathlib
import shutil

import numpy as np

FROZEN = pathlib.Path(__file__).parent / "frozen"
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F8_E4M3": 1, "I64": 8}


def read(directory):
    """Returns `{name: [code, shape, bytes]}` of all files of a directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        content = file.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (begin + offset for offset in entry["data_offsets"])
            found[name] = [entry["dtype"], entry["shape"], content[first:last]]
    return found


def write(file, tensors):
    header, offset = {}, 0
    for name, (code, shape, data) in tensors.items():
        header[name] = dict(dtype=code, shape=shape, data_offsets=[offset, offset + len(data)])
        offset += len(data)
    text = json.dumps(header).encode()
    content = b"".join(data for *_, data in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def zeros(code, *shape):
    return [code, list(shape), bytes(math.prod(shape) * WIDTHS[code])]


def with_value(tensor, value, place):
    """Returns the same tensor with one value replaced."""
    code, shape, data = tensor
    pattern = np.float32(value).tobytes() if code == "F32" else np.float32(value).tobytes()[2:]
    if code == "F16":
        pattern = np.float16(value).tobytes()
    start = place * WIDTHS[code]
    return [code, shape, data[:start] + pattern + data[start + len(pattern) :]]


def changed(name, directory, edit=None, **config):
    """Copies a frozen checkpoint to one file, with edited tensors and config.

    Args:
      name: name in `frozen`.
      directory: directory to write.
      edit: called with the tensors; changes them in place.
      **config: new values in `config.json`; `...` removes a key.
    """
    tensors = read(FROZEN / name)
    if edit is not None:
        edit(tensors)
    write(directory / "model.safetensors", tensors)
    content = json.loads((FROZEN / name / "config.json").read_text()) | config
    content = {key: value for key, value in content.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def copied(name, directory):
    """Copies a frozen checkpoint unchanged."""
    return pathlib.Path(shutil.copytree(FROZEN / name, directory, dirs_exist_ok=True))
