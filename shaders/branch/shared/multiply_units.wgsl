// `sums` of a subgroup's 16 tokens × 64 channels from `halves`, on matrix units. After branch/shared/tile_matrix.wgsl.

enable wgpu_cooperative_matrix;

#import branch/shared/place_units

fn multiply(count: u32) {
    var sum0: coop_mat16x16<f32, C>;
    var sum1: coop_mat16x16<f32, C>;
    var sum2: coop_mat16x16<f32, C>;
    var sum3: coop_mat16x16<f32, C>;
    let stride = STRIDE;
    for (var k = 0u; k < count; k += COLUMN_STEP) {
        let z_at = subgroup * 16u * STRIDE + k / 4u;
        let z_low_at = Z_LOW + z_at;
        let zh = coopLoadT<coop_mat16x16<f16, A>>(&halves[z_at], stride);
        let zl = coopLoadT<coop_mat16x16<f16, A>>(&halves[z_low_at], stride);
        let at0 = B_HIGH + k / 4u;
        let at1 = at0 + 16u * STRIDE;
        let at2 = at0 + 32u * STRIDE;
        let at3 = at0 + 48u * STRIDE;
        let high0 = coopLoad<coop_mat16x16<f16, B>>(&halves[at0], stride);
        let high1 = coopLoad<coop_mat16x16<f16, B>>(&halves[at1], stride);
        let high2 = coopLoad<coop_mat16x16<f16, B>>(&halves[at2], stride);
        let high3 = coopLoad<coop_mat16x16<f16, B>>(&halves[at3], stride);
        // Small terms come first.
        if (LOW) {
            let low_at0 = at0 + B_LOW - B_HIGH;
            let low_at1 = at1 + B_LOW - B_HIGH;
            let low_at2 = at2 + B_LOW - B_HIGH;
            let low_at3 = at3 + B_LOW - B_HIGH;
            let low0 = coopLoad<coop_mat16x16<f16, B>>(&halves[low_at0], stride);
            let low1 = coopLoad<coop_mat16x16<f16, B>>(&halves[low_at1], stride);
            let low2 = coopLoad<coop_mat16x16<f16, B>>(&halves[low_at2], stride);
            let low3 = coopLoad<coop_mat16x16<f16, B>>(&halves[low_at3], stride);
            sum0 = coopMultiplyAdd(zh, low0, sum0);
            sum1 = coopMultiplyAdd(zh, low1, sum1);
            sum2 = coopMultiplyAdd(zh, low2, sum2);
            sum3 = coopMultiplyAdd(zh, low3, sum3);
        }
        sum0 = coopMultiplyAdd(zl, high0, sum0);
        sum1 = coopMultiplyAdd(zl, high1, sum1);
        sum2 = coopMultiplyAdd(zl, high2, sum2);
        sum3 = coopMultiplyAdd(zl, high3, sum3);
        sum0 = coopMultiplyAdd(zh, high0, sum0);
        sum1 = coopMultiplyAdd(zh, high1, sum1);
        sum2 = coopMultiplyAdd(zh, high2, sum2);
        sum3 = coopMultiplyAdd(zh, high3, sum3);
    }
    let out_stride = OUT_STRIDE;
    let out0 = subgroup * 16u * OUT_STRIDE;
    let out1 = out0 + 4u;
    let out2 = out0 + 8u;
    let out3 = out0 + 12u;
    coopStoreT(sum0, &sums[out0], out_stride);
    coopStoreT(sum1, &sums[out1], out_stride);
    coopStoreT(sum2, &sums[out2], out_stride);
    coopStoreT(sum3, &sums[out3], out_stride);
}
