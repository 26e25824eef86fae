// Arithmetic of the kernels that are written once for all tiers: double-single, an unevaluated sum
// high + low of two f32 with |low| <= ulp(high) / 2, which carries about 47 bits.
//
// Shader compilers take a - (a + b - b) for zero. Every sum and product that is used again is hidden
// behind an XOR with a zero that only the run time knows; nothing less was found to work on all drivers.
// Algorithms: Dekker 1971 (products, by splitting), Knuth (two_sum), Hida, Li and Bailey 2001 (the rest; add_term is
// their sloppy addition).

alias Real = vec2<f32>;

const REAL_ZERO: Real = vec2<f32>(0.0, 0.0);
// Bound of the relative error of one operation, with room for division and square root.
const REAL_EPSILON: f32 = 1.0e-13;

fn hide(value: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(value) ^ params.zero);
}

// high + low = a + b exactly
fn two_sum(a: f32, b: f32) -> Real {
    let s = hide(a + b);
    let b_part = hide(s - a);
    let a_part = hide(s - b_part);
    return vec2<f32>(s, hide(a - a_part) + hide(b - b_part));
}

// high + low = a + b exactly, for |a| >= |b|
fn fast_two_sum(a: f32, b: f32) -> Real {
    let s = hide(a + b);
    return vec2<f32>(s, b - hide(s - a));
}

// The upper 12 bits of a mantissa. By mask: neither fma nor Dekker's multiplication is exact everywhere.
fn split_high(a: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(a) & 0xfffff000u);
}

// high + low = a·b exactly, short of underflow
fn two_product(a: f32, b: f32) -> Real {
    let p = hide(a * b);
    let a_high = split_high(a);
    let a_low = a - a_high;
    let b_high = split_high(b);
    let b_low = b - b_high;
    let e = hide(hide(a_high * b_high) - p) + hide(a_high * b_low);
    return vec2<f32>(p, (hide(e) + hide(a_low * b_high)) + a_low * b_low);
}

fn real(value: f32) -> Real {
    return vec2<f32>(value, 0.0);
}

fn real_to_f32(a: Real) -> f32 {
    return a.x + a.y;
}

fn real_add(a: Real, b: Real) -> Real {
    let high = two_sum(a.x, b.x);
    let low = two_sum(a.y, b.y);
    let t = fast_two_sum(high.x, high.y + low.x);
    return fast_two_sum(t.x, t.y + low.y);
}

fn real_sub(a: Real, b: Real) -> Real {
    return real_add(a, -b);
}

fn real_mul(a: Real, b: Real) -> Real {
    let p = two_product(a.x, b.x);
    return fast_two_sum(p.x, p.y + hide(hide(a.x * b.y) + hide(a.y * b.x)));
}

// c + p and a little more, with an error in relation to |c| + |p|, also where they cancel: what a sum of many terms has
// anyway, in half the operations of real_add.
fn add_term(c: Real, p: Real, more: f32) -> Real {
    let s = two_sum(c.x, p.x);
    return fast_two_sum(s.x, s.y + hide(hide(c.y + p.y) + more));
}

// c + a·b, with an error in relation to |c| + |a·b|
fn real_mul_add(a: Real, b: Real, c: Real) -> Real {
    return add_term(c, two_product(a.x, b.x), hide(a.x * b.y) + hide(a.y * b.x));
}

// c - a·b
fn real_mul_sub(a: Real, b: Real, c: Real) -> Real {
    return real_mul_add(-a, b, c);
}

// c + a·b for factors that are f32
fn real_mul_add_f32(a: f32, b: f32, c: Real) -> Real {
    return add_term(c, two_product(a, b), 0.0);
}

fn real_div(a: Real, b: Real) -> Real {
    let q1 = hide(a.x / b.x);
    let r1 = real_sub(a, real_mul(b, real(q1)));
    let q2 = hide(r1.x / b.x);
    let r2 = real_sub(r1, real_mul(b, real(q2)));
    let q3 = hide(r2.x / b.x);
    return real_add(fast_two_sum(q1, q2), real(q3));
}

// The root of a > 0.
fn real_sqrt(a: Real) -> Real {
    let s = hide(sqrt(a.x));
    let half_inverse = hide(0.5 / s);
    // Newton: s + (a - s²) / 2s, twice, since the built-in may be a few ulps off.
    let t = fast_two_sum(s, hide(real_sub(a, two_product(s, s)).x * half_inverse));
    return real_add(t, real(hide(real_sub(a, real_mul(t, t)).x * half_inverse)));
}

// a > b; false also when either is NaN.
fn real_greater(a: Real, b: Real) -> bool {
    return a.x > b.x || (a.x == b.x && a.y > b.y);
}

fn real_abs(a: Real) -> Real {
    return select(a, -a, a.x < 0.0);
}
