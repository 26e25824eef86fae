// Strips: 16 neighbouring values in one invocation's registers, which it substitutes alone, without a barrier.
// By name rather than in arrays, which compilers put into memory. After real_*.wgsl; the kernel fills
// `diagonal` and `inverse`.

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
        real_sub(c.x, real_mul(s, f.x)),
        real_sub(c.y, real_mul(s, f.y)),
        real_sub(c.z, real_mul(s, f.z)),
        real_sub(c.w, real_mul(s, f.w)),
    );
}

// c - s·f
fn strip_sub(c: Strip, s: Real, f: Strip) -> Strip {
    return Strip(quad_sub(c.a, s, f.a), quad_sub(c.b, s, f.b), quad_sub(c.c, s, f.c), quad_sub(c.d, s, f.d));
}

fn quad_zero() -> Quad {
    return Quad(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO);
}

// U[row, column .. column + 4]
fn diagonal_quad(row: u32, column: u32) -> Quad {
    let e = row * PANEL + column;
    return Quad(diagonal[e], diagonal[e + 1u], diagonal[e + 2u], diagonal[e + 3u]);
}

// c - x·U[k .. k + 4, column .. column + 4]
fn eliminate(c: Quad, x: Quad, k: u32, column: u32) -> Quad {
    var rest = quad_sub(c, x.x, diagonal_quad(k, column));
    rest = quad_sub(rest, x.y, diagonal_quad(k + 1u, column));
    rest = quad_sub(rest, x.z, diagonal_quad(k + 2u, column));
    return quad_sub(rest, x.w, diagonal_quad(k + 3u, column));
}

// x with x·U[k .. k + 4, k .. k + 4] = c
fn quad_solve(c: Quad, k: u32) -> Quad {
    let e = k * (PANEL + 1u);
    let x = real_mul(c.x, inverse[k]);
    let y = real_mul(real_sub(c.y, real_mul(x, diagonal[e + 1u])), inverse[k + 1u]);
    var z = real_sub(c.z, real_mul(x, diagonal[e + 2u]));
    z = real_mul(real_sub(z, real_mul(y, diagonal[e + PANEL + 2u])), inverse[k + 2u]);
    var w = real_sub(c.w, real_mul(x, diagonal[e + 3u]));
    w = real_sub(w, real_mul(y, diagonal[e + PANEL + 3u]));
    w = real_mul(real_sub(w, real_mul(z, diagonal[e + 2u * PANEL + 3u])), inverse[k + 3u]);
    return Quad(x, y, z, w);
}

// x with x·U = c
fn strip_solve(c: Strip) -> Strip {
    let x = quad_solve(c.a, 0u);
    let y = quad_solve(eliminate(c.b, x, 0u, 4u), 4u);
    let z = quad_solve(eliminate(eliminate(c.c, x, 0u, 8u), y, 4u, 8u), 8u);
    let last = eliminate(eliminate(eliminate(c.d, x, 0u, 12u), y, 4u, 12u), z, 8u, 12u);
    return Strip(x, y, z, quad_solve(last, 12u));
}
