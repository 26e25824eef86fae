// `sums` of a subgroup's block on matrix units. After branch/shared/block.wgsl.

enable wgpu_cooperative_matrix;

#import branch/shared/meet_units
#import branch/shared/block_any

// There is nothing to hold: Z is read where it is needed.
fn hold() {}

// Columns `first` .. `end` of B_cat's rows from `channel` on by Z's columns from `place` on. 16 channels.
fn multiply(job: Job, channel: u32, first: u32, end: u32, place: u32) {
    var upper: coop_mat16x16<f32, C>;
    var lower: coop_mat16x16<f32, C>;
    let stride = STRIDE;
    let fragment_stride = 4u;
    for (var k = first; k < end; k += COLUMN_STEP) {
        let z_at = (place + k - first) / 4u;
        let z_lower_at = z_at + 16u * STRIDE;
        let z_upper = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[z_at], stride);
        let z_lower = coopLoadT<coop_mat16x16<f16, A>>(&z_halves[z_lower_at], stride);
        let b_at = fragment(job, channel, k);
        let b = coopLoad<coop_mat16x16<f16, B>>(&b_halves[b_at], fragment_stride);
        upper = coopMultiplyAdd(z_upper, b, upper);
        lower = coopMultiplyAdd(z_lower, b, lower);
    }
    let out = subgroup * OUT_LEN;
    let out_lower = out + 16u * OUT_STRIDE;
    let out_stride = OUT_STRIDE;
    coopStoreT(upper, &sums[out], out_stride);
    coopStoreT(lower, &sums[out_lower], out_stride);
}
