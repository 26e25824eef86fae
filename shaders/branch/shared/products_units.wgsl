// Sums of products of branch/project_halves.wgsl on matrix units: 32 tokens × COLUMNS for each subgroup.

enable wgpu_cooperative_matrix;

#import branch/shared/meet_units

// Rows 0 .. 16 and 16 .. 32, of 16 columns each.
var<private> upper0: coop_mat16x16<f32, C>;
var<private> upper1: coop_mat16x16<f32, C>;
var<private> upper2: coop_mat16x16<f32, C>;
var<private> upper3: coop_mat16x16<f32, C>;
var<private> lower0: coop_mat16x16<f32, C>;
var<private> lower1: coop_mat16x16<f32, C>;
var<private> lower2: coop_mat16x16<f32, C>;
var<private> lower3: coop_mat16x16<f32, C>;

fn clear_sums() {
    var zero: coop_mat16x16<f32, C>;
    upper0 = zero;
    upper1 = zero;
    upper2 = zero;
    upper3 = zero;
    lower0 = zero;
    lower1 = zero;
    lower2 = zero;
    lower3 = zero;
}

// Adds the subgroup's part of X, from `channel` on, by A_cat's rows from `row` on.
fn add_products(job: Job, channel: u32, row: u32) {
    let stride = STRIDE;
    let fragment_stride = 4u;
    for (var k = 0u; k < DEPTH; k += 16u) {
        let upper_at = subgroup * TOKENS * STRIDE + k / 4u;
        let lower_at = upper_at + 16u * STRIDE;
        let x_upper = coopLoadT<coop_mat16x16<f16, A>>(&x_halves[upper_at], stride);
        let x_lower = coopLoadT<coop_mat16x16<f16, A>>(&x_halves[lower_at], stride);
        let a0_at = fragment(job, channel + k, row);
        let a1_at = a0_at + 64u;
        let a0 = coopLoad<coop_mat16x16<f16, B>>(&a_halves[a0_at], fragment_stride);
        let a1 = coopLoad<coop_mat16x16<f16, B>>(&a_halves[a1_at], fragment_stride);
        upper0 = coopMultiplyAdd(x_upper, a0, upper0);
        lower0 = coopMultiplyAdd(x_lower, a0, lower0);
        upper1 = coopMultiplyAdd(x_upper, a1, upper1);
        lower1 = coopMultiplyAdd(x_lower, a1, lower1);
        if (COLUMNS == 64u) {
            let a2_at = a0_at + 128u;
            let a3_at = a0_at + 192u;
            let a2 = coopLoad<coop_mat16x16<f16, B>>(&a_halves[a2_at], fragment_stride);
            let a3 = coopLoad<coop_mat16x16<f16, B>>(&a_halves[a3_at], fragment_stride);
            upper2 = coopMultiplyAdd(x_upper, a2, upper2);
            lower2 = coopMultiplyAdd(x_lower, a2, lower2);
            upper3 = coopMultiplyAdd(x_upper, a3, upper3);
            lower3 = coopMultiplyAdd(x_lower, a3, lower3);
        }
    }
}

// Puts 16 columns into `sums`.
fn put_sums(block: u32) {
    let upper_at = subgroup * OUT_LEN;
    let lower_at = upper_at + 16u * OUT_STRIDE;
    let stride = OUT_STRIDE;
    switch (block) {
        case 0u: {
            coopStoreT(upper0, &sums[upper_at], stride);
            coopStoreT(lower0, &sums[lower_at], stride);
        }
        case 1u: {
            coopStoreT(upper1, &sums[upper_at], stride);
            coopStoreT(lower1, &sums[lower_at], stride);
        }
        case 2u: {
            coopStoreT(upper2, &sums[upper_at], stride);
            coopStoreT(lower2, &sums[lower_at], stride);
        }
        default: {
            coopStoreT(upper3, &sums[upper_at], stride);
            coopStoreT(lower3, &sums[lower_at], stride);
        }
    }
}
