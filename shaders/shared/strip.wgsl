// Strips: 16 neighbouring values in one invocation's registers, which it substitutes alone, without a barrier.
// They have names rather than places in arrays, which compilers put into memory. The kernel fills
// `diagonal` and `inverse`.

#import real

const PANEL: u32 = 16u;

struct Quad {
    x: Real,
    y: Real,
    z: Real,
    w: Real,
}

struct Strip {
    a: Quad,
    b: Quad,
    c: Quad,
    d: Quad,
}

// A PANEL × PANEL block U, upper triangular, row-major; what is below its diagonal is not read.
var<workgroup> diagonal: array<Real, PANEL * PANEL>;
// 1 / U_kk; where U has no column k, zero.
var<workgroup> inverse: array<Real, PANEL>;

// c - s·f
fn quad_sub(c: Quad, s: Real, f: Quad) -> Quad {
    return Quad(
        real_mul_sub(s, f.x, c.x),
        real_mul_sub(s, f.y, c.y),
        real_mul_sub(s, f.z, c.z),
        real_mul_sub(s, f.w, c.w),
    );
}

// c - s·f
fn strip_sub(c: Strip, s: Real, f: Strip) -> Strip {
    return Strip(quad_sub(c.a, s, f.a), quad_sub(c.b, s, f.b), quad_sub(c.c, s, f.c), quad_sub(c.d, s, f.d));
}

fn quad_zero() -> Quad {
    return Quad(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO);
}

fn strip_zero() -> Strip {
    return Strip(quad_zero(), quad_zero(), quad_zero(), quad_zero());
}

// U[row, column .. column + 4]
fn diagonal_quad(row: u32, column: u32) -> Quad {
    let e = row * PANEL + column;
    return Quad(diagonal[e], diagonal[e + 1u], diagonal[e + 2u], diagonal[e + 3u]);
}

// Rotates the values, so that the next one comes first. Loops that rotate compile in a fraction of the time of what they
// stand for, and a compiler that unrolls them renames the registers.
fn quad_rotate(c: Quad) -> Quad {
    return Quad(c.y, c.z, c.w, c.x);
}

// c - x·U[k .. k + 4, column .. column + 4]
fn eliminate(c: Quad, x: Quad, k: u32, column: u32) -> Quad {
    var rest = c;
    var factors = x;
    for (var i = 0u; i < 4u; i++) {
        rest = quad_sub(rest, factors.x, diagonal_quad(k + i, column));
        factors = quad_rotate(factors);
    }
    return rest;
}

// x with x·U[k .. k + 4, k .. k + 4] = c
fn quad_solve(c: Quad, k: u32) -> Quad {
    let e = k * (PANEL + 1u);
    let x = real_mul(c.x, inverse[k]);
    let y = real_mul(real_mul_sub(x, diagonal[e + 1u], c.y), inverse[k + 1u]);
    var z = real_mul_sub(x, diagonal[e + 2u], c.z);
    z = real_mul(real_mul_sub(y, diagonal[e + PANEL + 2u], z), inverse[k + 2u]);
    var w = real_mul_sub(x, diagonal[e + 3u], c.w);
    w = real_mul_sub(y, diagonal[e + PANEL + 3u], w);
    w = real_mul(real_mul_sub(z, diagonal[e + 2u * PANEL + 3u], w), inverse[k + 3u]);
    return Quad(x, y, z, w);
}

// x with x·U = c
fn strip_solve(c: Strip) -> Strip {
    var rest = c;
    for (var k = 0u; k < PANEL; k += 4u) {
        let x = quad_solve(rest.a, k);
        if (k < 12u) {
            rest.b = eliminate(rest.b, x, k, k + 4u);
        }
        if (k < 8u) {
            rest.c = eliminate(rest.c, x, k, k + 8u);
        }
        if (k < 4u) {
            rest.d = eliminate(rest.d, x, k, k + 12u);
        }
        rest = Strip(rest.b, rest.c, rest.d, x);
    }
    return rest;
}
