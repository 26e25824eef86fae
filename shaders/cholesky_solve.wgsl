// Solves X·UᵀU = Q for X, in place of Q: a right-hand side is a row.
//
//   U: order × order upper triangular factor of cholesky.wgsl      Q, X: rows × order; all row-major, Real
//
// First Y·U = Q column panel by column panel, then X·Uᵀ = Y backwards, which is X'·U' = Y' forwards when
// columns are counted from the last: U'_kc = U_(n-1-c)(n-1-k) is upper triangular too. A workgroup solves
// ROWS rows by panels of two strips of 16 columns: it subtracts what the solved columns contribute, 4 × 4
// elements of each strip a thread, then each thread substitutes in a row of its own.
//
// Work: (job, row block, first step, end step): a step solves a panel, forwards and then backwards; a launch
// takes some of them, so that none takes too long. Bindings: 3 U, 4 Q.

#import shared/params
#import real
#import shared/strip

struct Job {
    factor: u32,    // first element
    order: u32,
    right: u32,     // first element of Q
    rows: u32,
}

@group(0) @binding(3) var<storage, read> u: array<Real>;
@group(0) @binding(4) var<storage, read_write> q: array<Real>;

const ROWS: u32 = 64u;
// A thread substitutes in one row, and fetches 16 values of all.
const THREADS: u32 = ROWS;
// Odd, so that neither a row nor a column of a tile meets in one bank.
const SOLVED_STRIDE: u32 = PANEL + 1u;
const FACTOR_STRIDE: u32 = 2u * PANEL + 1u;
// A thread has 4 neighbouring columns and 4 rows at this distance.
const APART: u32 = ROWS / 4u;

// [row][column] of a strip: solved, or on its way between tiles, rows and memory
var<workgroup> solved: array<Real, ROWS * SOLVED_STRIDE>;
// [k][column] of U, or of U'
var<workgroup> factor: array<Real, PANEL * FACTOR_STRIDE>;

// Values that a thread copies to workgroup memory are fetched a Strip at a time and then stored: written as loops, each
// fetch waits for the store before it, which takes three times as long.
const ROWS_AT_ONCE: u32 = THREADS / PANEL;

// U or U' for k <= c; zero outside.
fn load_factor(job: Job, k: u32, c: u32, forward: bool) -> Real {
    if (k > c || c >= job.order) {
        return REAL_ZERO;
    }
    let n = job.order;
    // U'_kc = U_(n-1-c)(n-1-k)
    let e = select((n - 1u - c) * n + n - 1u - k, k * n + c, forward);
    return u[job.factor + e];
}

// The place of element e in a block of 16 rows and so many columns, so that neighbours are neighbours in U.
fn block_place(e: u32, columns: u32, forward: bool) -> vec2<u32> {
    return select(vec2<u32>(e % PANEL, e / PANEL), vec2<u32>(e / columns, e % columns), forward);
}

fn load_block(job: Job, k: u32, c: u32, e: u32, columns: u32, forward: bool) -> Real {
    let place = block_place(e, columns, forward);
    return load_factor(job, k + place.x, c + place.y, forward);
}

// Four elements of a block, THREADS apart.
fn block_quad(job: Job, k: u32, c: u32, e: u32, columns: u32, forward: bool) -> Quad {
    return Quad(
        load_block(job, k, c, e, columns, forward),
        load_block(job, k, c, e + THREADS, columns, forward),
        load_block(job, k, c, e + 2u * THREADS, columns, forward),
        load_block(job, k, c, e + 3u * THREADS, columns, forward),
    );
}

fn put_factor(e: u32, forward: bool, value: Real) {
    let place = block_place(e, 2u * PANEL, forward);
    factor[place.x * FACTOR_STRIDE + place.y] = value;
}

fn put_factor_quad(e: u32, forward: bool, values: Quad) {
    put_factor(e, forward, values.x);
    put_factor(e + THREADS, forward, values.y);
    put_factor(e + 2u * THREADS, forward, values.z);
    put_factor(e + 3u * THREADS, forward, values.w);
}

// Copies rows k .. k + 16 and columns c .. c + 32 of U or U' to `factor`.
fn fetch_factor(job: Job, k: u32, c: u32, forward: bool, t: u32) {
    let a = block_quad(job, k, c, t, 2u * PANEL, forward);
    let b = block_quad(job, k, c, t + 4u * THREADS, 2u * PANEL, forward);
    put_factor_quad(t, forward, a);
    put_factor_quad(t + 4u * THREADS, forward, b);
}

fn put_diagonal(e: u32, forward: bool, value: Real) {
    let place = block_place(e, PANEL, forward);
    diagonal[place.x * PANEL + place.y] = value;
}

// Prepares the block on the diagonal at c for substitution.
fn fetch_diagonal(job: Job, c: u32, forward: bool, t: u32) {
    let values = block_quad(job, c, c, t, PANEL, forward);
    put_diagonal(t, forward, values.x);
    put_diagonal(t + THREADS, forward, values.y);
    put_diagonal(t + 2u * THREADS, forward, values.z);
    put_diagonal(t + 3u * THREADS, forward, values.w);
    if (t < PANEL) {
        inverse[t] = REAL_ZERO;
        if (c + t < job.order) {
            inverse[t] = real_div(real(1.0), load_factor(job, c + t, c + t, forward));
        }
    }
}

// The element of Q at a row and the c-th column, counted from the first or the last.
fn place(job: Job, row: u32, c: u32, forward: bool) -> u32 {
    return job.right + row * job.order + select(job.order - 1u - c, c, forward);
}

fn load_row(job: Job, row: u32, c: u32, forward: bool) -> Real {
    if (row >= job.rows || c >= job.order) {
        return REAL_ZERO;
    }
    return q[place(job, row, c, forward)];
}

fn rows_quad(job: Job, row: u32, c: u32, forward: bool) -> Quad {
    return Quad(
        load_row(job, row, c, forward),
        load_row(job, row + ROWS_AT_ONCE, c, forward),
        load_row(job, row + 2u * ROWS_AT_ONCE, c, forward),
        load_row(job, row + 3u * ROWS_AT_ONCE, c, forward),
    );
}

fn put_rows_quad(row: u32, j: u32, values: Quad) {
    let e = row * SOLVED_STRIDE + j;
    let apart = ROWS_AT_ONCE * SOLVED_STRIDE;
    solved[e] = values.x;
    solved[e + apart] = values.y;
    solved[e + 2u * apart] = values.z;
    solved[e + 3u * apart] = values.w;
}

// Copies columns c .. c + 16 of the workgroup's rows to `solved`; zero outside.
fn fetch_rows(job: Job, first: u32, c: u32, forward: bool, t: u32) {
    let j = t % PANEL;
    let i = t / PANEL;
    let a = rows_quad(job, first + i, c + j, forward);
    let b = rows_quad(job, first + i + 4u * ROWS_AT_ONCE, c + j, forward);
    let d = rows_quad(job, first + i + 8u * ROWS_AT_ONCE, c + j, forward);
    let e = rows_quad(job, first + i + 12u * ROWS_AT_ONCE, c + j, forward);
    put_rows_quad(i, j, a);
    put_rows_quad(i + 4u * ROWS_AT_ONCE, j, b);
    put_rows_quad(i + 8u * ROWS_AT_ONCE, j, d);
    put_rows_quad(i + 12u * ROWS_AT_ONCE, j, e);
}

fn store_rows(job: Job, first: u32, c: u32, forward: bool, t: u32) {
    let j = t % PANEL;
    for (var i = t / PANEL; i < ROWS; i += ROWS_AT_ONCE) {
        if (first + i < job.rows && c + j < job.order) {
            q[place(job, first + i, c + j, forward)] = solved[i * SOLVED_STRIDE + j];
        }
    }
}

fn factor_quad(k: u32, column: u32) -> Quad {
    let e = k * FACTOR_STRIDE + column;
    return Quad(factor[e], factor[e + 1u], factor[e + 2u], factor[e + 3u]);
}

fn solved_quad(row: u32, column: u32) -> Quad {
    let e = row * SOLVED_STRIDE + column;
    return Quad(solved[e], solved[e + 1u], solved[e + 2u], solved[e + 3u]);
}

fn put_solved(row: u32, column: u32, c: Quad) {
    let e = row * SOLVED_STRIDE + column;
    solved[e] = c.x;
    solved[e + 1u] = c.y;
    solved[e + 2u] = c.z;
    solved[e + 3u] = c.w;
}

// A thread's tile of a strip: a quad of each of its rows.
fn tile(t: u32) -> Strip {
    let row = t / 4u;
    let column = t % 4u * 4u;
    return Strip(
        solved_quad(row, column),
        solved_quad(row + APART, column),
        solved_quad(row + 2u * APART, column),
        solved_quad(row + 3u * APART, column),
    );
}

fn put_tile(t: u32, c: Strip) {
    let row = t / 4u;
    let column = t % 4u * 4u;
    put_solved(row, column, c.a);
    put_solved(row + APART, column, c.b);
    put_solved(row + 2u * APART, column, c.c);
    put_solved(row + 3u * APART, column, c.d);
}

// A column of a thread's four rows.
fn solved_rows(t: u32, column: u32) -> Quad {
    let e = t / 4u * SOLVED_STRIDE + column;
    let apart = APART * SOLVED_STRIDE;
    return Quad(solved[e], solved[e + apart], solved[e + 2u * apart], solved[e + 3u * apart]);
}

// c - s·f, a row of a tile each
fn tile_sub(c: Strip, s: Quad, f: Quad) -> Strip {
    return Strip(quad_sub(c.a, s.x, f), quad_sub(c.b, s.y, f), quad_sub(c.c, s.z, f), quad_sub(c.d, s.w, f));
}

// Substitutes in the rows of `solved`, each thread in its own.
fn substitute(t: u32) {
    let x = strip_solve(Strip(solved_quad(t, 0u), solved_quad(t, 4u), solved_quad(t, 8u), solved_quad(t, 12u)));
    put_solved(t, 0u, x.a);
    put_solved(t, 4u, x.b);
    put_solved(t, 8u, x.c);
    put_solved(t, 12u, x.d);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first = work.y * ROWS;
    let panels = (job.order + 2u * PANEL - 1u) / (2u * PANEL);

    for (var step = work.z; step < work.w; step++) {
        let forward = step < panels;
        let p = select(step - panels, step, forward) * 2u * PANEL;

        // In a loop: written out, the strips take a compiler that inlines and unrolls nothing, as that of SwiftShader,
        // minutes instead of seconds.
        var left = strip_zero();
        var right = strip_zero();
        for (var c = p; c < p + 2u * PANEL; c += PANEL) {
            fetch_rows(job, first, c, forward, t);
            workgroupBarrier();
            left = right;
            right = tile(t);
            workgroupBarrier();
        }

        // The left strip by all columns left of the panel; the right one then by the left one.
        for (var c = p; c < p + 2u * PANEL; c += PANEL) {
            fetch_diagonal(job, c, forward, t);
            for (var k = select(p, 0u, c == p); k < c; k += PANEL) {
                workgroupBarrier();
                if (k < p) {
                    fetch_rows(job, first, k, forward, t);
                }
                fetch_factor(job, k, c, forward, t);
                workgroupBarrier();
                if (c == p) {
                    for (var d = 0u; d < PANEL; d++) {
                        let s = solved_rows(t, d);
                        left = tile_sub(left, s, factor_quad(d, t % 4u * 4u));
                        right = tile_sub(right, s, factor_quad(d, PANEL + t % 4u * 4u));
                    }
                } else {
                    for (var d = 0u; d < PANEL; d++) {
                        left = tile_sub(left, solved_rows(t, d), factor_quad(d, t % 4u * 4u));
                    }
                }
            }
            workgroupBarrier();
            put_tile(t, left);
            left = right;
            workgroupBarrier();
            substitute(t);
            workgroupBarrier();
            store_rows(job, first, c, forward, t);
        }
        storageBarrier();
        workgroupBarrier();
    }
}
