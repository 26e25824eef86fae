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

#import params
#import real
#import strip

struct Job {
    factor: u32,    // first element
    order: u32,
    right: u32,     // first element of Q
    rows: u32,
}

@group(0) @binding(3) var<storage, read> u: array<Real>;
@group(0) @binding(4) var<storage, read_write> q: array<Real>;

const ROWS: u32 = 64u;
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

// The column that is counted as the c-th.
fn counted(job: Job, c: u32, forward: bool) -> u32 {
    return select(job.order - 1u - c, c, forward);
}

// U or U' for k <= c; zero outside.
fn load_factor(job: Job, k: u32, c: u32, forward: bool) -> Real {
    if (k > c || c >= job.order) {
        return REAL_ZERO;
    }
    let row = counted(job, select(c, k, forward), forward);
    let column = counted(job, select(k, c, forward), forward);
    return u[job.factor + row * job.order + column];
}

// Copies rows k .. k + 16 and columns c .. c + 32 of U or U' to `factor`, along U's rows.
fn fetch_factor(job: Job, k: u32, c: u32, forward: bool, t: u32) {
    for (var e = t; e < 2u * PANEL * PANEL; e += THREADS) {
        let i = select(e % PANEL, e / (2u * PANEL), forward);
        let j = select(e / PANEL, e % (2u * PANEL), forward);
        factor[i * FACTOR_STRIDE + j] = load_factor(job, k + i, c + j, forward);
    }
}

// Prepares the block on the diagonal at c for substitution.
fn fetch_diagonal(job: Job, c: u32, forward: bool, t: u32) {
    for (var e = t; e < PANEL * PANEL; e += THREADS) {
        let i = select(e % PANEL, e / PANEL, forward);
        let j = select(e / PANEL, e % PANEL, forward);
        diagonal[i * PANEL + j] = load_factor(job, c + i, c + j, forward);
    }
    if (t < PANEL) {
        inverse[t] = REAL_ZERO;
        if (c + t < job.order) {
            inverse[t] = real_div(real(1.0), load_factor(job, c + t, c + t, forward));
        }
    }
}

// Copies columns c .. c + 16 of the workgroup's rows to `solved`; zero outside.
fn fetch_rows(job: Job, first: u32, c: u32, forward: bool, t: u32) {
    let j = t % PANEL;
    for (var i = t / PANEL; i < ROWS; i += THREADS / PANEL) {
        var value = REAL_ZERO;
        if (first + i < job.rows && c + j < job.order) {
            value = q[job.right + (first + i) * job.order + counted(job, c + j, forward)];
        }
        solved[i * SOLVED_STRIDE + j] = value;
    }
}

fn store_rows(job: Job, first: u32, c: u32, forward: bool, t: u32) {
    let j = t % PANEL;
    for (var i = t / PANEL; i < ROWS; i += THREADS / PANEL) {
        if (first + i < job.rows && c + j < job.order) {
            q[job.right + (first + i) * job.order + counted(job, c + j, forward)] = solved[i * SOLVED_STRIDE + j];
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

        fetch_rows(job, first, p, forward, t);
        workgroupBarrier();
        var left = tile(t);
        workgroupBarrier();
        fetch_rows(job, first, p + PANEL, forward, t);
        workgroupBarrier();
        var right = tile(t);

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
