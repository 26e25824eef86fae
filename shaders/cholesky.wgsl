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
// Columns right of the diagonal that are made at a time, by 4 groups of threads with 4 rows each.
const COLUMNS: u32 = 64u;

// [k][row]: the panel's columns in 16 finished rows
var<workgroup> above: array<Real, PANEL * PANEL>;
// [k][column]: the tile's columns in the same rows; then finished rows of the tile itself
var<workgroup> beside: array<Real, PANEL * COLUMNS>;
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
    let lane = t % COLUMNS;
    let group = t / COLUMNS * 4u;
    if (t == 0u) {
        failed = select(0u, status[index], work.y > 0u);
    }

    for (var p = work.y * PANEL; p < min(work.z * PANEL, n); p += PANEL) {
        let height = min(PANEL, n - p);

        // The 16 × 16 block on the diagonal, an element a thread: A minus what the finished rows contribute.
        let inside = i < height && j < height && i <= j;
        var mine = REAL_ZERO;
        if (inside) {
            mine = a[base + (p + i) * n + p + j];
            if (i == j) {
                original[i] = mine;
            }
        }
        for (var k = 0u; k < p; k += PANEL) {
            workgroupBarrier();
            above[t] = REAL_ZERO;
            if (j < height) {
                above[t] = a[base + (k + i) * n + p + j];
            }
            workgroupBarrier();
            for (var d = 0u; d < PANEL; d++) {
                mine = real_sub(mine, real_mul(above[d * PANEL + i], above[d * PANEL + j]));
            }
        }

        // Factor it.
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

        // The panel's rows right of it, U_ddᵀ·X = A minus the finished rows' part, tile by tile.
        for (var first = p + height; first < n; first += COLUMNS) {
            let column = first + lane;
            let place = base + (p + group) * n + column;
            var v0 = REAL_ZERO;
            var v1 = REAL_ZERO;
            var v2 = REAL_ZERO;
            var v3 = REAL_ZERO;
            // There are columns right of the panel, so it has its full height.
            if (column < n) {
                v0 = a[place];
                v1 = a[place + n];
                v2 = a[place + 2u * n];
                v3 = a[place + 3u * n];
            }
            for (var k = 0u; k < p; k += PANEL) {
                workgroupBarrier();
                above[t] = a[base + (k + i) * n + p + j];
                for (var r = 0u; r < 4u; r++) {
                    if (column < n) {
                        beside[(group + r) * COLUMNS + lane] = a[base + (k + group + r) * n + column];
                    }
                }
                workgroupBarrier();
                for (var d = 0u; d < PANEL; d++) {
                    let u = beside[d * COLUMNS + lane];
                    v0 = real_sub(v0, real_mul(above[d * PANEL + group], u));
                    v1 = real_sub(v1, real_mul(above[d * PANEL + group + 1u], u));
                    v2 = real_sub(v2, real_mul(above[d * PANEL + group + 2u], u));
                    v3 = real_sub(v3, real_mul(above[d * PANEL + group + 3u], u));
                }
            }
            workgroupBarrier();
            // Substitution: row r is finished by its group, then taken out of the rows below.
            for (var r = 0u; r < PANEL; r++) {
                if (r / 4u * 4u == group) {
                    let low = select(v0, v1, r % 4u == 1u);
                    let high = select(v2, v3, r % 4u == 3u);
                    beside[r * COLUMNS + lane] = real_mul(select(low, high, r % 4u >= 2u), inverse[r]);
                }
                workgroupBarrier();
                let x = beside[r * COLUMNS + lane];
                if (group > r) { v0 = real_sub(v0, real_mul(diagonal[r * PANEL + group], x)); }
                if (group + 1u > r) { v1 = real_sub(v1, real_mul(diagonal[r * PANEL + group + 1u], x)); }
                if (group + 2u > r) { v2 = real_sub(v2, real_mul(diagonal[r * PANEL + group + 2u], x)); }
                if (group + 3u > r) { v3 = real_sub(v3, real_mul(diagonal[r * PANEL + group + 3u], x)); }
            }
            if (column < n) {
                for (var r = 0u; r < 4u; r++) {
                    a[place + r * n] = beside[(group + r) * COLUMNS + lane];
                }
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
