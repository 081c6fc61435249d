"""What is not plainly a number, although a number is in it, and forms in which it is written."""

EXPRESSIONS = r"""
The cost is $72 million.
The cost is 72 million dollars.
The cost is about seventy-two dollars after 3 days.
Answer: 72 (thousand)
The answer is 7 2
The answer is 72 73
It is either 72 or seventy.
72? No, that's wrong.
The answer isn't 72.
The answer is 72 squared
The answer is the square of 72
The answer is the square root of 72
the cube of 3
3 cubed
The answer is 3 to the power of 4
The answer is 3 to the 4th power
The answer is 3 to the fourth
the 5th root of 32
5 choose 2
The answer is 5 choose 2.
There were 12 choose 3 ways
The answer is 3 dozen.
The answer is 3 dozens of eggs.
3 score and ten
a factor of 3
The answer is 72 percent of 50
72% of x
The answer is 1 in 6
1 out of 6
The odds are 3 to 1
The score was 3-2
The ratio is 3:2.
3 : 2
The time is 3:30.
The time is 3:30 pm
The time is 3 pm
The time is 3 o'clock
It takes 3 h 20 min
It takes 3h20
3 hours and 20 minutes
He is 5 ft 11 in tall
He is 5'11"
5 ft 11
It's 5° 30'
version 2.0.1
on 12/25/2024
On 3 May 2024
May 3, 2024
2024-05-03
2024/05/03
Chapter 3
see page 72
Step 3
x = 3, y = 4
x=3 and y=4
x = 3 or x = 4
x = 3, 4
x = ±3
x = \pm 3
x \in \{3, 4\}
x \in (3, 4]
x \geq 3
x ≥ 3
x <= 3
x != 3
x ≠ 3
x > 3
x > -3
$x > 3$
$\sqrt{3}$
√3
The answer is √3
2√3
$2\sqrt{3}$
$\sqrt[3]{2}$
$\frac{1}{\sqrt{2}}$
$\frac{\pi}{2}$
π/2
pi/2
2pi
2*pi
2 * 3
2 x 3
2 × 3
2·3
2^3
2**3
2 ^ 3
$2^{3}$
$e^{2}$
e^2
e^-2
$x^2$
x^2
x²
x₂
$x_2$
$a_{12}$
$\log_2 8$
log 8
ln 2
sin 30
$\sin 30^\circ$
f(2)
f(x) = 2x
f(2) = x
$|3|$
abs(-3)
(3)
[3]
\{3\}
(2, 3)
[2, 3]
(2; 3)
2; 3
2, 3
2,3
2/3/4
2//3
7 mod 3
7 % 3
7%3
7! 
7!
7!!
3C2
3i
2+3i
2 + 3
2 - 3
2-3
2–3
2—3
2 − 3
-2 - 3
1e3x
1e
e3
0x1F
1F
12AB
AB12
A1
ISO9001
COVID19
H2O
CO2
B12 vitamin
#5a
5#
5@x
user5@mail.com
http://a.b/5
192.168.1.1
1.2.3
1,2
1,23
1,2,3
12,3456
1 23
1 2345
1'23
1_2
0,5
5.5.5
..5
5..6
5...6
5…
5...
~5 to 6
<5
>5
≤5
5+
5 +
5-
8 minus 5
minus minus 5
--5
-(-5)
-(5)
+-5
5/-2
5/+2
5/2i
5/x
x/5
1/2x
1/2 x
1/2pi
1/2 + 1/3
1/2 1/3
3 1/0
3 -1/2
3 1/2 1/2
3 and 1/2
3 & 1/2
3.5 1/2
13 1/2 2
\frac{1}{2}\frac{1}{3}
\frac{1}{2}+1
1+\frac{1}{2}
\frac{1}{2}^2
\frac12^2
\left(\frac12\right)^2
\frac{1}{2}x
x\frac{1}{2}
\frac{1+1}{2}
\frac{1}{2}\cdot 3
\frac{3}{4}\text{ of }x
\frac{a}{2}
\frac{1}{n+1}
\dfrac{n}{3}
\frac{5!}{3}
\frac{1}{2}!
10^3x
10^{3x}
10^{n}
10^3 + 1
10^3^2
10^{3}^{2}
-10^{x}
x10^3
1.5 \times 10^n
1.5 \times 10^{3}x
1.5 \times 10
1.5e3.5
1.5e3e2
5 million
5 mln
5 mio.
5 Mrd.
5 Tsd.
5 Mill.
5 MM
5MM
5 G
5G
5 K
5 T
5 万
5万
5億
5 тысяч
5 ألف
5 лет
5 lakhs
5 crores
5 hundredths
5 halves
5 quarters
5 and a quarter
5 and one third
5 times as many
5 times
5 twos
5 fives
5 tens
5 twelfths
5 over 6
5 by 6
5 by six
5 into 6
5 percent less
5 less than x
5 fewer
5 more than x
5 below zero
5 degrees below zero
5 degrees below freezing
5 above
5 under par
5 short
5 BC
5 B.C.
5 negative
5 in the negative
5 (negative)
5 positive or negative
5 with a minus sign
5, but negative
5, negative
5 with opposite sign
5 with the sign flipped
5 to the negative power
5 raised to two
5 repeating
0.3 repeating
0.3 recurring
0.(3)
0.\overline{3}
0.\dot{3}
0.3̅
$0.\bar{3}$
5 factorial
5 prime
5 base ten
5 (base 8)
5 in octal
5_{10}
5_8
5 sub 8
5 subscript 8
101 binary
101b
0b101
0o17
FF
XII
none of the 5
Not 5.
not equal to 5
is not 5
5 is false
5 is incorrect
5 is not correct
5 isn't correct
5 cannot be right
5 was my first guess
5 is too small
5 is too big
5 is impossible
5 is the wrong answer
5 doesn't work
5 fails
5 seems wrong
if x were 5
unless it is 5
5?
5??
maybe 5 or so
about 5 or six
5 plus or minus one
5 ± 1
5 +/- 1
between 5 and x
from 5 upwards
5 and up
5 or above
up to 5
at least 5
at most 5
over 5
under 5
more than 5
fewer than 5
no more than 5
not less than 5
almost 5
nearly 5
just under 5
just over 5
5-ish
5ish
5-fold
5fold
5x
5X
x5
5th power
5th root
5 squared units
5 units, squared
two 5s
two 5's
5s
5's
the 1990s
half of 5
half 5
a third of 5
2/3 of 5
twice 5
double 5
double of 5
5 doubled
5 halved
5 tripled
triple 5
sum of 5
the negative of 5
the opposite of 5
the reciprocal of 5
the inverse of 5
one over 5
one fifth of 5
one divided by 5
the factorial of 5
factorial 5
log base 5
mod 5
modulo 5
base 5
the complement of 5
a multiple of 5
multiples of 5
divisible by 5
5 divides it
a power of 5
five 5
hundred 5
a hundred and 5
a thousand 5
one hundred 5
minus 5 degrees squared
5 dozen minus one
5 less one
5 take away one
5 without one
5 except one
5 subtract one
5 add one
5 increased by one
5 decreased by one
5 multiplied by ten
5 divided by ten
5 tenfold
5 a pair
5 pairs of shoes
5 couples
5 trios
5 gross
5 score years
5 bakers dozens
5 kilo
5 mega
5 grand
5 big ones
""".strip("\n").split("\n")

FORMS = (
    "%s",
    "#### %s",
    r"\boxed{%s}",
    r"\boxed{\text{%s}}",
    "The answer is %s",
    "So the answer is $%s$.",
    "Then there were 3 cats. Answer: %s.",
    "We know n = 2.\n\nFinal answer: **%s**",
)
