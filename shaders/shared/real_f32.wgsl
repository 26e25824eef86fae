// Arithmetic of the kernels that are written once for all tiers: single precision.

alias Real = f32;

const REAL_ZERO: Real = 0.0;
const REAL_EPSILON: f32 = 1.1920929e-7;

fn real(value: f32) -> Real {
    return value;
}

fn real_to_f32(a: Real) -> f32 {
    return a;
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
    return fma(a, b, c);
}

// c - a·b
fn real_mul_sub(a: Real, b: Real, c: Real) -> Real {
    return fma(-a, b, c);
}

// c + a·b for factors that are f32
fn real_mul_add_f32(a: f32, b: f32, c: Real) -> Real {
    return fma(a, b, c);
}
