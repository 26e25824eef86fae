// Solves X·UᵀU = Q for X, in place of Q: a right-hand side is a row.
//
//   U: order × order upper triangular factor of cholesky.wgsl      Q, X: rows × order; all row-major, Real
//
// First Y·U = Q column panel by column panel, then X·Uᵀ = Y backwards, which is X'·U' = Y' forwards when
// columns are counted from the last: U'_kc = U_(n-1-c)(n-1-k) is upper triangular too. A workgroup solves
// ROWS rows by panels of 16 columns: it subtracts what the solved columns contribute, 4 × 4 elements a
// thread, then each thread substitutes in a row of its own.
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
const STRIDE: u32 = PANEL + 1u;
// A thread has 4 neighbouring columns and 4 rows at this distance.
const APART: u32 = ROWS / 4u;

// [row][k] of solved columns; then [row][column] of the panel
var<workgroup> solved: array<Real, ROWS * STRIDE>;
// [k][column] of U, or of U'
var<workgroup> factor: array<Real, PANEL * STRIDE>;

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

fn factor_quad(k: u32, column: u32) -> Quad {
    let e = k * STRIDE + column;
    return Quad(factor[e], factor[e + 1u], factor[e + 2u], factor[e + 3u]);
}

fn put_solved(row: u32, column: u32, c: Quad) {
    let e = row * STRIDE + column;
    solved[e] = c.x;
    solved[e + 1u] = c.y;
    solved[e + 2u] = c.z;
    solved[e + 3u] = c.w;
}

fn solved_quad(row: u32, column: u32) -> Quad {
    let e = row * STRIDE + column;
    return Quad(solved[e], solved[e + 1u], solved[e + 2u], solved[e + 3u]);
}

// Fetches columns c .. c + 16 of the workgroup's rows into `solved`; zero outside.
fn fetch_rows(job: Job, first: u32, c: u32, forward: bool, t: u32) {
    let j = t % PANEL;
    for (var i = t / PANEL; i < ROWS; i += THREADS / PANEL) {
        var value = REAL_ZERO;
        if (first + i < job.rows && c + j < job.order) {
            value = q[job.right + (first + i) * job.order + counted(job, c + j, forward)];
        }
        solved[i * STRIDE + j] = value;
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let n = job.order;
    let first = work.y * ROWS;
    let panels = (n + PANEL - 1u) / PANEL;
    let row = t / 4u;
    let column = t % 4u * 4u;

    for (var step = work.z; step < work.w; step++) {
        let forward = step < panels;
        let p = select(step - panels, step, forward) * PANEL;

        // The block on the diagonal, whose upper triangle substitution reads; U and U' along U's rows.
        for (var e = t; e < PANEL * PANEL; e += THREADS) {
            let k = select(e % PANEL, e / PANEL, forward);
            let c = select(e / PANEL, e % PANEL, forward);
            diagonal[k * PANEL + c] = load_factor(job, p + k, p + c, forward);
        }
        if (t < PANEL) {
            inverse[t] = REAL_ZERO;
            if (p + t < n) {
                inverse[t] = real_div(real(1.0), load_factor(job, p + t, p + t, forward));
            }
        }

        fetch_rows(job, first, p, forward, t);
        workgroupBarrier();
        var c0 = solved_quad(row, column);
        var c1 = solved_quad(row + APART, column);
        var c2 = solved_quad(row + 2u * APART, column);
        var c3 = solved_quad(row + 3u * APART, column);
        for (var k = 0u; k < p; k += PANEL) {
            workgroupBarrier();
            fetch_rows(job, first, k, forward, t);
            for (var e = t; e < PANEL * PANEL; e += THREADS) {
                let d = select(e % PANEL, e / PANEL, forward);
                let c = select(e / PANEL, e % PANEL, forward);
                factor[d * STRIDE + c] = load_factor(job, k + d, p + c, forward);
            }
            workgroupBarrier();
            for (var d = 0u; d < PANEL; d++) {
                let f = factor_quad(d, column);
                c0 = quad_sub(c0, solved[row * STRIDE + d], f);
                c1 = quad_sub(c1, solved[(row + APART) * STRIDE + d], f);
                c2 = quad_sub(c2, solved[(row + 2u * APART) * STRIDE + d], f);
                c3 = quad_sub(c3, solved[(row + 3u * APART) * STRIDE + d], f);
            }
        }

        // From tiles to rows: each thread substitutes in one of its own.
        workgroupBarrier();
        put_solved(row, column, c0);
        put_solved(row + APART, column, c1);
        put_solved(row + 2u * APART, column, c2);
        put_solved(row + 3u * APART, column, c3);
        workgroupBarrier();
        let x = strip_solve(Strip(solved_quad(t, 0u), solved_quad(t, 4u), solved_quad(t, 8u), solved_quad(t, 12u)));
        put_solved(t, 0u, x.a);
        put_solved(t, 4u, x.b);
        put_solved(t, 8u, x.c);
        put_solved(t, 12u, x.d);
        workgroupBarrier();
        let j = t % PANEL;
        for (var i = t / PANEL; i < ROWS; i += THREADS / PANEL) {
            if (first + i < job.rows && p + j < n) {
                q[job.right + (first + i) * n + counted(job, p + j, forward)] = solved[i * STRIDE + j];
            }
        }
        storageBarrier();
        workgroupBarrier();
    }
}
