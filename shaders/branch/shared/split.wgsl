// Halves of Z and B_cat for matrix units: cut by mask into high and low parts of 11 bits; row by row, each branch's
// columns padded with zeros to a multiple of COLUMN_STEP. The kernel declares `values`, which are split.

const COLUMN_STEP: u32 = 16u;

// B_cat's largest value is in [1, 2): this keeps it out of f16's subnormal numbers.
const B_SCALE: f32 = 4096.0;

// At most this, 2^112, rows of Z are scaled by: what undoes it must be normal, B_SCALE included.
const MOST_SCALE: f32 = 5.192296858534828e33;

fn branch_of(column: u32) -> u32 {
    var branch = 0u;
    while (column >= jobs[0].column_starts[branch + 1u]) {
        branch++;
    }
    return branch;
}

// Four neighbouring columns of a row, `step` elements apart, from element `first` of the branch's first column on.
fn quad(first: u32, step: u32, k: u32, rank: u32) -> vec4<f32> {
    var value = vec4<f32>(0.0);
    if (k < rank) { value.x = values[first + k * step]; }
    if (k + 1u < rank) { value.y = values[first + (k + 1u) * step]; }
    if (k + 2u < rank) { value.z = values[first + (k + 2u) * step]; }
    if (k + 3u < rank) { value.w = values[first + (k + 3u) * step]; }
    return value;
}
