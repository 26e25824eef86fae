// Solves X·UᵀU = Q for X, in place of Q: a right-hand side is a row.
//
//   U: order × order upper triangular factor of cholesky.wgsl      Q, X: rows × order; all row-major, Real
//
// First Y·U = Q column panel by column panel, then X·Uᵀ = Y backwards. A workgroup solves 16 rows, a
// thread holds one element of the 16 × 16 block that is being solved.
//
// Work: (job, row block, first step, end step): a step solves a panel, forwards and then backwards; a launch
// takes some of them, so that none takes too long. Bindings: 3 U, 4 Q.

#import params
#import real

struct Job {
    factor: u32,    // first element
    order: u32,
    right: u32,     // first element of Q
    rows: u32,
}

@group(0) @binding(3) var<storage, read> u: array<Real>;
@group(0) @binding(4) var<storage, read_write> q: array<Real>;

const PANEL: u32 = 16u;
const DEPTH: u32 = 32u;

// [row][k] of solved columns
var<workgroup> solved: array<Real, PANEL * DEPTH>;
// [k][column] of U or Uᵀ, padded so that storing a transposed row does not meet in one bank.
const STRIDE: u32 = PANEL + 1u;
var<workgroup> factor: array<Real, DEPTH * STRIDE>;
var<workgroup> diagonal: array<Real, PANEL * PANEL>;

fn load_solved(job: Job, row: u32, k: u32, end: u32) -> Real {
    if (row >= job.rows || k >= end) {
        return REAL_ZERO;
    }
    return q[job.right + row * job.order + k];
}

fn load_factor(job: Job, row: u32, column: u32) -> Real {
    if (row >= job.order || column >= job.order) {
        return REAL_ZERO;
    }
    return u[job.factor + row * job.order + column];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let n = job.order;
    let i = t / PANEL;
    let j = t % PANEL;
    let row = work.y * PANEL + i;
    let panels = (n + PANEL - 1u) / PANEL;

    for (var step = work.z; step < work.w; step++) {
        let forward = step < panels;
        let p = select(2u * panels - 1u - step, step, forward) * PANEL;
        let column = p + j;
        let begin = select(p + PANEL, 0u, forward);
        let end = select(n, p, forward);
        var value = load_solved(job, row, column, n);

        for (var k = begin; k < end; k += DEPTH) {
            workgroupBarrier();
            for (var half = 0u; half < DEPTH; half += PANEL) {
                solved[i * DEPTH + half + j] = load_solved(job, row, k + half + j, end);
                // Forwards U[k.., p..], backwards U[p.., k..], each read along its rows.
                if (forward) {
                    factor[(half + i) * STRIDE + j] = load_factor(job, k + half + i, column);
                } else {
                    factor[(half + j) * STRIDE + i] = load_factor(job, p + i, k + half + j);
                }
            }
            workgroupBarrier();
            for (var d = 0u; d < DEPTH; d++) {
                value = real_sub(value, real_mul(solved[i * DEPTH + d], factor[d * STRIDE + j]));
            }
        }

        // Substitute within the block on the diagonal.
        workgroupBarrier();
        diagonal[t] = load_factor(job, p + i, column);
        workgroupBarrier();
        let height = min(PANEL, n - p);
        for (var c = 0u; c < height; c++) {
            let k = select(height - 1u - c, c, forward);
            if (j == k) {
                value = real_div(value, diagonal[k * PANEL + k]);
                solved[i * DEPTH + k] = value;
            }
            workgroupBarrier();
            if (forward && j > k) {
                value = real_sub(value, real_mul(solved[i * DEPTH + k], diagonal[k * PANEL + j]));
            }
            if (!forward && j < k) {
                value = real_sub(value, real_mul(solved[i * DEPTH + k], diagonal[j * PANEL + k]));
            }
        }
        if (row < job.rows && column < n) {
            q[job.right + row * n + column] = value;
        }
        storageBarrier();
    }
}
