// block_units.wgsl where 64 columns of Z are all: they stay in registers, and products need no loop.

enable wgpu_cooperative_matrix;

#import branch/shared/meet_units

// Rows 0 .. 16 and 16 .. 32, of 16 columns each.
var<private> upper0: coop_mat16x16<f16, A>;
var<private> upper1: coop_mat16x16<f16, A>;
var<private> upper2: coop_mat16x16<f16, A>;
var<private> upper3: coop_mat16x16<f16, A>;
var<private> lower0: coop_mat16x16<f16, A>;
var<private> lower1: coop_mat16x16<f16, A>;
var<private> lower2: coop_mat16x16<f16, A>;
var<private> lower3: coop_mat16x16<f16, A>;

// Takes Z into registers, once it is staged.
fn hold() {
    let stride = STRIDE;
    let upper0_at = 0u;
    let lower0_at = upper0_at + 16u * STRIDE;
    upper0 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[upper0_at], stride);
    lower0 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[lower0_at], stride);
    let upper1_at = 4u;
    let lower1_at = upper1_at + 16u * STRIDE;
    upper1 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[upper1_at], stride);
    lower1 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[lower1_at], stride);
    let upper2_at = 8u;
    let lower2_at = upper2_at + 16u * STRIDE;
    upper2 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[upper2_at], stride);
    lower2 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[lower2_at], stride);
    let upper3_at = 12u;
    let lower3_at = upper3_at + 16u * STRIDE;
    upper3 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[upper3_at], stride);
    lower3 = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[lower3_at], stride);
}

// The fragment of columns from `column` on, or of the last ones: beyond them Z is zero.
fn fragment_within(job: Job, channel: u32, column: u32) -> u32 {
    return fragment(job, channel, min(column, job.columns - COLUMN_STEP));
}

// Puts the sums of 16 channels into vector `vector` of the rows of `sums` and on.
fn put(upper: coop_mat16x16<f32, C>, lower: coop_mat16x16<f32, C>, vector: u32) {
    let out = subgroup * OUT_LEN + vector;
    let out_lower = out + 16u * OUT_STRIDE;
    let out_stride = OUT_STRIDE;
    coopStoreT(upper, &sums[out], out_stride);
    coopStoreT(lower, &sums[out_lower], out_stride);
}

// The first of two branches, which has half of Z: columns from `first` on of B_cat, of 16 channels.
fn multiply_first(job: Job, channel: u32, first: u32, end: u32) {
    let fragment_stride = 4u;
    let b0_at = fragment_within(job, channel, first);
    let b0 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b0_at], fragment_stride);
    let b1_at = fragment_within(job, channel, first + COLUMN_STEP);
    let b1 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b1_at], fragment_stride);
    var upper: coop_mat16x16<f32, C>;
    var lower: coop_mat16x16<f32, C>;
    upper = coopMultiplyAdd(upper0, b0, upper);
    lower = coopMultiplyAdd(lower0, b0, lower);
    upper = coopMultiplyAdd(upper1, b1, upper);
    lower = coopMultiplyAdd(lower1, b1, lower);
    put(upper, lower, 0u);
}

// The second, which has the other half.
fn multiply_second(job: Job, channel: u32, first: u32, end: u32, place: u32) {
    let fragment_stride = 4u;
    let b2_at = fragment_within(job, channel, first);
    let b2 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b2_at], fragment_stride);
    let b3_at = fragment_within(job, channel, first + COLUMN_STEP);
    let b3 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b3_at], fragment_stride);
    var upper: coop_mat16x16<f32, C>;
    var lower: coop_mat16x16<f32, C>;
    upper = coopMultiplyAdd(upper2, b2, upper);
    lower = coopMultiplyAdd(lower2, b2, lower);
    upper = coopMultiplyAdd(upper3, b3, upper);
    lower = coopMultiplyAdd(lower3, b3, lower);
    put(upper, lower, 0u);
}

fn multiply_16_channels(job: Job, channel: u32, vector: u32) {
    let fragment_stride = 4u;
    let b0_at = fragment_within(job, channel, 0u);
    let b0 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b0_at], fragment_stride);
    let b1_at = fragment_within(job, channel, 16u);
    let b1 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b1_at], fragment_stride);
    let b2_at = fragment_within(job, channel, 32u);
    let b2 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b2_at], fragment_stride);
    let b3_at = fragment_within(job, channel, 48u);
    let b3 = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b3_at], fragment_stride);
    var upper: coop_mat16x16<f32, C>;
    var lower: coop_mat16x16<f32, C>;
    upper = coopMultiplyAdd(upper0, b0, upper);
    lower = coopMultiplyAdd(lower0, b0, lower);
    upper = coopMultiplyAdd(upper1, b1, upper);
    lower = coopMultiplyAdd(lower1, b1, lower);
    upper = coopMultiplyAdd(upper2, b2, upper);
    lower = coopMultiplyAdd(lower2, b2, lower);
    upper = coopMultiplyAdd(upper3, b3, upper);
    lower = coopMultiplyAdd(lower3, b3, lower);
    put(upper, lower, vector);
}

// All columns, of CHANNELS channels.
fn multiply_all(job: Job, channel: u32) {
    multiply_16_channels(job, channel, 0u);
    if (CHANNELS == 32u) {
        multiply_16_channels(job, channel + 16u, 4u);
    }
}
