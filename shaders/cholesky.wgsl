// Batched Cholesky factorisation A = UᵀU, in place; U is upper triangular, zeros below.
//
//   A: order × order, symmetric positive definite, row-major, Real; only its upper triangle is read
//   status: one word a matrix: 0, or 1 + the index of the first pivot that is not safely positive
//
// A pivot p_k is safely positive when p_k > order·ε·A_kk; NaN is not. After one that is not, the
// factor is meaningless, but the kernel goes on with 1 in its place, so that control flow stays uniform.
//
// Left-looking over panels of 16 rows; one workgroup a matrix. Rows of U are read along their length, so
// neighbouring threads read neighbouring elements.
//
// Work: (job, first panel, end panel): a launch factors some panels of a matrix, so that none takes too long.
// Bindings: 3 A, 4 status.

#import params
#import real

struct Job {
    matrix: u32,    // first element
    order: u32,
}

@group(0) @binding(3) var<storage, read_write> a: array<Real>;
@group(0) @binding(4) var<storage, read_write> status: array<u32>;

const THREADS: u32 = 256u;
const PANEL: u32 = 16u;
// Columns that are updated at a time, by 4 groups of threads with 4 rows of the panel each.
const COLUMNS: u32 = 64u;

// [k][row]: columns of the panel in 16 finished rows
var<workgroup> above: array<Real, PANEL * PANEL>;
var<workgroup> diagonal: array<Real, PANEL * PANEL>;
// The diagonal of A before anything was subtracted from it.
var<workgroup> original: array<Real, PANEL>;
var<workgroup> inverse: array<Real, PANEL>;
var<workgroup> failed: u32;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let index = work.x;
    let job = jobs[index];
    let n = job.order;
    let base = job.matrix;
    let i = t / PANEL;
    let j = t % PANEL;
    if (t == 0u) {
        failed = select(0u, status[index], work.y > 0u);
    }

    for (var p = work.y * PANEL; p < min(work.z * PANEL, n); p += PANEL) {
        let height = min(PANEL, n - p);

        // Rows p.. of A minus what the finished rows contribute.
        let lane = t % COLUMNS;
        let group = t / COLUMNS * 4u;
        for (var first = p; first < n; first += COLUMNS) {
            let column = first + lane;
            var s0 = REAL_ZERO;
            var s1 = REAL_ZERO;
            var s2 = REAL_ZERO;
            var s3 = REAL_ZERO;
            for (var k = 0u; k < p; k += PANEL) {
                workgroupBarrier();
                if (j < height) {
                    above[t] = a[base + (k + i) * n + p + j];
                }
                workgroupBarrier();
                if (column < n) {
                    for (var d = 0u; d < PANEL; d++) {
                        let u = a[base + (k + d) * n + column];
                        s0 = real_mul_add(above[d * PANEL + group], u, s0);
                        s1 = real_mul_add(above[d * PANEL + group + 1u], u, s1);
                        s2 = real_mul_add(above[d * PANEL + group + 2u], u, s2);
                        s3 = real_mul_add(above[d * PANEL + group + 3u], u, s3);
                    }
                }
            }
            if (column < n) {
                for (var r = 0u; r < 4u; r++) {
                    let row = group + r;
                    if (row < height) {
                        let e = base + (p + row) * n + column;
                        let value = a[e];
                        if (column == p + row) {
                            original[row] = value;
                        }
                        let s = select(select(s0, s1, r == 1u), select(s2, s3, r == 3u), r >= 2u);
                        a[e] = real_sub(value, s);
                    }
                }
            }
        }
        storageBarrier();
        workgroupBarrier();

        // Factor the 16 × 16 block on the diagonal, an element a thread.
        let inside = i < height && j < height && i <= j;
        var mine = REAL_ZERO;
        if (inside) {
            mine = a[base + (p + i) * n + p + j];
        }
        diagonal[t] = mine;
        workgroupBarrier();
        for (var k = 0u; k < height; k++) {
            var pivot = diagonal[k * PANEL + k];
            let least = real_mul(original[k], real(f32(n) * REAL_EPSILON));
            if (!real_greater(pivot, least) || !real_greater(pivot, REAL_ZERO)) {
                pivot = real(1.0);
                if (t == 0u && failed == 0u) {
                    failed = p + k + 1u;
                }
            }
            if (i == k) {
                let root = real_sqrt(pivot);
                if (j == k) {
                    mine = root;
                    inverse[k] = real_div(real(1.0), root);
                } else {
                    mine = real_div(mine, root);
                }
            } else if (inside && i > k) {
                let factor = real_div(diagonal[k * PANEL + i], pivot);
                mine = real_sub(mine, real_mul(factor, diagonal[k * PANEL + j]));
                diagonal[t] = mine;
            }
            workgroupBarrier();
        }
        diagonal[t] = mine;
        if (inside) {
            a[base + (p + i) * n + p + j] = mine;
        }
        workgroupBarrier();

        // The rest of the panel's rows: U_ddᵀ·X = A, a column a thread.
        for (var column = p + height + t; column < n; column += THREADS) {
            for (var r = 0u; r < height; r++) {
                let e = base + (p + r) * n + column;
                var value = a[e];
                for (var d = 0u; d < r; d++) {
                    let product = real_mul(diagonal[d * PANEL + r], a[base + (p + d) * n + column]);
                    value = real_sub(value, product);
                }
                a[e] = real_mul(value, inverse[r]);
            }
        }
        storageBarrier();
        workgroupBarrier();
    }

    if (work.z * PANEL >= n) {
        for (var e = t; e < n * n; e += THREADS) {
            if (e / n > e % n) {
                a[base + e] = REAL_ZERO;
            }
        }
    }
    if (t == 0u) {
        status[index] = failed;
    }
}
