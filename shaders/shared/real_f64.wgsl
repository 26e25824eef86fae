// Arithmetic of the kernels that are written once for all tiers: native double precision.

alias Real = f64;

const REAL_ZERO: Real = 0.0lf;
// Bound of the relative error of one operation.
const REAL_EPSILON: f32 = 2.220446e-16;

fn real(value: f32) -> Real {
    return f64(value);
}

fn real_to_f32(a: Real) -> f32 {
    return f32(a);
}

fn real_add(a: Real, b: Real) -> Real {
    return a + b;
}

fn real_sub(a: Real, b: Real) -> Real {
    return a - b;
}

fn real_mul(a: Real, b: Real) -> Real {
    return a * b;
}

// c + a·b
fn real_mul_add(a: Real, b: Real, c: Real) -> Real {
    return c + a * b;
}

// c - a·b
fn real_mul_sub(a: Real, b: Real, c: Real) -> Real {
    return c - a * b;
}

// c + a·b for factors that are f32
fn real_mul_add_f32(a: f32, b: f32, c: Real) -> Real {
    return c + f64(a) * f64(b);
}

fn real_div(a: Real, b: Real) -> Real {
    return a / b;
}

fn real_sqrt(a: Real) -> Real {
    return sqrt(a);
}

// a > b; false also when either is NaN.
fn real_greater(a: Real, b: Real) -> bool {
    return a > b;
}

fn real_abs(a: Real) -> Real {
    return abs(a);
}
