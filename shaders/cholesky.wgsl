// Batched Cholesky factorisation A = UᵀU, in place; U is upper triangular, zeros below.
//
//   A: order × order, symmetric positive definite, row-major, Real; only its upper triangle is read
//   status: one word a matrix: 0, or 1 + the index of the first pivot that is not safely positive
//
// A pivot p_k is safely positive when p_k > order·ε·A_kk; NaN is not. After one that is not, the
// factor is meaningless, but the kernel goes on with 1 in its place, so that control flow stays uniform.
//
// Left-looking over panels of 16 rows; one workgroup a matrix. A thread makes a column of the panel in
// registers: it subtracts what the finished rows contribute and substitutes in the block on the diagonal.
// Neighbouring threads have neighbouring columns, so rows of U are read along their length.
//
// Work: (job, first panel, end panel): a launch factors some panels of a matrix, so that none takes too long.
// Bindings: 3 A, 4 status.

#import shared/params
#import real
#import shared/strip

struct Job {
    matrix: u32,    // first element
    order: u32,
}

@group(0) @binding(3) var<storage, read_write> a: array<Real>;
@group(0) @binding(4) var<storage, read_write> status: array<u32>;

// Columns that are made at a time.
const THREADS: u32 = 128u;
// Finished rows whose part is subtracted between two barriers.
const DEPTH: u32 = 64u;

// [k][row]: the panel's columns in finished rows
var<workgroup> above: array<Real, DEPTH * PANEL>;
// The diagonal of A before anything was subtracted from it, and the pivots.
var<workgroup> original: array<Real, PANEL>;
var<workgroup> pivots: array<Real, PANEL>;
var<workgroup> failed: u32;

// A or U at a place; zero below the diagonal and outside.
fn upper(job: Job, row: u32, column: u32) -> Real {
    if (row > column || column >= job.order) {
        return REAL_ZERO;
    }
    return a[job.matrix + row * job.order + column];
}

// Four rows of a column.
fn upper_quad(job: Job, row: u32, column: u32) -> Quad {
    return Quad(
        upper(job, row, column),
        upper(job, row + 1u, column),
        upper(job, row + 2u, column),
        upper(job, row + 3u, column),
    );
}

fn above_quad(e: u32) -> Quad {
    return Quad(above[e], above[e + 1u], above[e + 2u], above[e + 3u]);
}

fn above_strip(k: u32) -> Strip {
    let e = k * PANEL;
    return Strip(above_quad(e), above_quad(e + 4u), above_quad(e + 8u), above_quad(e + 12u));
}

// A's rows p .. p + 16 of a column, minus what the rows above p contribute.
fn updated(job: Job, p: u32, column: u32, t: u32) -> Strip {
    var c = Strip(
        upper_quad(job, p, column),
        upper_quad(job, p + 4u, column),
        upper_quad(job, p + 8u, column),
        upper_quad(job, p + 12u, column),
    );
    // What is fetched for the next four rows while four are subtracted.
    var next = quad_zero();
    if (p > 0u) {
        next = upper_quad(job, 0u, column);
    }
    for (var k = 0u; k < p; k += DEPTH) {
        let depth = min(DEPTH, p - k);
        workgroupBarrier();
        for (var e = t; e < depth * PANEL; e += THREADS) {
            above[e] = upper(job, k + e / PANEL, p + e % PANEL);
        }
        workgroupBarrier();
        if (column < job.order) {
            for (var d = 0u; d < depth; d += 4u) {
                var u = next;
                if (k + d + 4u < p) {
                    next = upper_quad(job, k + d + 4u, column);
                }
                for (var i = 0u; i < 4u; i++) {
                    c = strip_sub(c, u.x, above_strip(d + i));
                    u = quad_rotate(u);
                }
            }
        }
    }
    return c;
}

fn put_diagonal(row: u32, j: u32, c: Quad) {
    diagonal[row * PANEL + j] = c.x;
    diagonal[(row + 1u) * PANEL + j] = c.y;
    diagonal[(row + 2u) * PANEL + j] = c.z;
    diagonal[(row + 3u) * PANEL + j] = c.w;
}

// Factors the block on the diagonal and stores it, with the zeros left of it and below.
fn factor(job: Job, p: u32, t: u32) {
    let n = job.order;
    let height = min(PANEL, n - p);
    // Rows are divided by the roots of their pivots after all steps, since a root takes as long as a step.
    for (var k = 0u; k < height; k++) {
        var pivot = diagonal[k * PANEL + k];
        let least = real_mul(original[k], real(f32(n) * REAL_EPSILON));
        let safe = real_greater(pivot, least) && real_greater(pivot, REAL_ZERO);
        if (!safe) {
            pivot = real(1.0);
        }
        if (t == 0u) {
            pivots[k] = pivot;
            if (!safe && failed == 0u) {
                failed = p + k + 1u;
            }
        }
        for (var e = t; e < PANEL * PANEL; e += THREADS) {
            let i = e / PANEL;
            let j = e % PANEL;
            if (i > k && i <= j && j < height) {
                // A product with 1 / pivot would leave the range of double-single far sooner.
                let scaled = real_div(diagonal[k * PANEL + i], pivot);
                diagonal[e] = real_mul_sub(scaled, diagonal[k * PANEL + j], diagonal[e]);
            }
        }
        workgroupBarrier();
    }
    for (var e = t; e < PANEL * PANEL; e += THREADS) {
        let i = e / PANEL;
        let j = e % PANEL;
        if (i < height && j < height) {
            let root = real_sqrt(pivots[i]);
            let reciprocal = real_div(real(1.0), root);
            var value = REAL_ZERO;
            if (i == j) {
                value = root;
                inverse[i] = reciprocal;
            } else if (i < j) {
                value = real_mul(diagonal[e], reciprocal);
            }
            diagonal[e] = value;
            a[job.matrix + (p + i) * n + p + j] = value;
        }
        if (i < height) {
            for (var column = j; column < p; column += PANEL) {
                a[job.matrix + (p + i) * n + column] = REAL_ZERO;
            }
        }
    }
    workgroupBarrier();
}

fn store_quad(job: Job, row: u32, column: u32, c: Quad) {
    let place = job.matrix + row * job.order + column;
    a[place] = c.x;
    a[place + job.order] = c.y;
    a[place + 2u * job.order] = c.z;
    a[place + 3u * job.order] = c.w;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let index = work.x;
    let job = jobs[index];
    let n = job.order;
    if (t == 0u) {
        failed = select(0u, status[index], work.y > 0u);
    }

    for (var p = work.y * PANEL; p < min(work.z * PANEL, n); p += PANEL) {
        for (var first = p; first < n; first += THREADS) {
            let column = first + t;
            let c = updated(job, p, column, t);
            if (first == p) {
                if (t < PANEL) {
                    original[t] = upper(job, p + t, p + t);
                    put_diagonal(0u, t, c.a);
                    put_diagonal(4u, t, c.b);
                    put_diagonal(8u, t, c.c);
                    put_diagonal(12u, t, c.d);
                }
                workgroupBarrier();
                factor(job, p, t);
            }
            // There are columns right of the diagonal's block, so it has its full height.
            if (column >= p + PANEL && column < n) {
                let x = strip_solve(c);
                store_quad(job, p, column, x.a);
                store_quad(job, p + 4u, column, x.b);
                store_quad(job, p + 8u, column, x.c);
                store_quad(job, p + 12u, column, x.d);
            }
        }
        storageBarrier();
        workgroupBarrier();
    }

    if (t == 0u) {
        status[index] = failed;
    }
}
