// C = L·R with sums in Real, a tile of ROWS × COLUMNS for each workgroup. A thread makes ROWS / 16 rows of it, and 4 columns
// that are 16 apart, so that neighbours read neighbouring elements of R.
//
//   L: rows × inner      R: inner × cols      C: rows × cols; all row-major
//
// Work: (job, tile row, tile column).
// The kernel says what a `Left` and a `Right` are and which is zero, gives an element of each, makes it a Real, and stores a
// sum; its Job has rows, inner and cols. It sets ROWS, 32 or 64, and where rows lie: those of thread i are ROW_STEP·i and
// others ROW_APART from there, and in `left_tile` they start ROW_STRIDE apart, with columns DEPTH_STRIDE apart.

const COLUMNS: u32 = 64u;
const DEPTH: u32 = 16u;
const APART: u32 = 16u;

var<workgroup> left_tile: array<Left, LEFT_LEN>;
// [k][column]
var<workgroup> right_tile: array<Right, DEPTH * COLUMNS>;

// A thread's columns of a row.
struct Quad {
    x: Real,
    y: Real,
    z: Real,
    w: Real,
}

fn add_products(sum: Quad, factor: Real, values: Quad) -> Quad {
    return Quad(
        real_mul_add(factor, values.x, sum.x),
        real_mul_add(factor, values.y, sum.y),
        real_mul_add(factor, values.z, sum.z),
        real_mul_add(factor, values.w, sum.w),
    );
}

fn fetch_left(job: Job, row: u32, k: u32) -> Left {
    if (row >= job.rows || k >= job.inner) {
        return LEFT_ZERO;
    }
    return left(job, row, k);
}

fn fetch_right(job: Job, k: u32, column: u32) -> Right {
    if (k >= job.inner || column >= job.cols) {
        return RIGHT_ZERO;
    }
    return right(job, k, column);
}

fn left_place(row: u32, k: u32) -> u32 {
    return row * ROW_STRIDE + k * DEPTH_STRIDE;
}

fn left_value(row: u32, k: u32) -> Real {
    return left_real(left_tile[left_place(row, k)]);
}

fn store_row(job: Job, row: u32, column: u32, sum: Quad) {
    store(job, row, column, sum.x);
    store(job, row, column + APART, sum.y);
    store(job, row, column + 2u * APART, sum.z);
    store(job, row, column + 3u * APART, sum.w);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let first_row = work.y * ROWS;
    let first_column = work.z * COLUMNS;
    let i = t / 16u;
    let j = t % 16u;
    let own_row = i * ROW_STEP;
    var sum0 = Quad(REAL_ZERO, REAL_ZERO, REAL_ZERO, REAL_ZERO);
    var sum1 = sum0;
    var sum2 = sum0;
    var sum3 = sum0;
    for (var k = 0u; k < job.inner; k += DEPTH) {
        // Element (i, j) of every 16 rows of L, and of every 16 columns of R.
        let l0 = fetch_left(job, first_row + i, k + j);
        let l1 = fetch_left(job, first_row + i + 16u, k + j);
        var l2: Left;
        var l3: Left;
        if (ROWS == 64u) {
            l2 = fetch_left(job, first_row + i + 32u, k + j);
            l3 = fetch_left(job, first_row + i + 48u, k + j);
        }
        let r0 = fetch_right(job, k + i, first_column + j);
        let r1 = fetch_right(job, k + i, first_column + j + APART);
        let r2 = fetch_right(job, k + i, first_column + j + 2u * APART);
        let r3 = fetch_right(job, k + i, first_column + j + 3u * APART);
        workgroupBarrier();
        left_tile[left_place(i, j)] = l0;
        left_tile[left_place(i + 16u, j)] = l1;
        if (ROWS == 64u) {
            left_tile[left_place(i + 32u, j)] = l2;
            left_tile[left_place(i + 48u, j)] = l3;
        }
        right_tile[i * COLUMNS + j] = r0;
        right_tile[i * COLUMNS + j + APART] = r1;
        right_tile[i * COLUMNS + j + 2u * APART] = r2;
        right_tile[i * COLUMNS + j + 3u * APART] = r3;
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d++) {
            let at = d * COLUMNS + j;
            let values = Quad(
                right_real(right_tile[at]),
                right_real(right_tile[at + APART]),
                right_real(right_tile[at + 2u * APART]),
                right_real(right_tile[at + 3u * APART]),
            );
            sum0 = add_products(sum0, left_value(own_row, d), values);
            sum1 = add_products(sum1, left_value(own_row + ROW_APART, d), values);
            if (ROWS == 64u) {
                sum2 = add_products(sum2, left_value(own_row + 2u * ROW_APART, d), values);
                sum3 = add_products(sum3, left_value(own_row + 3u * ROW_APART, d), values);
            }
        }
    }
    let row = first_row + own_row;
    let column = first_column + j;
    store_row(job, row, column, sum0);
    store_row(job, row + ROW_APART, column, sum1);
    if (ROWS == 64u) {
        store_row(job, row + 2u * ROW_APART, column, sum2);
        store_row(job, row + 3u * ROW_APART, column, sum3);
    }
}
