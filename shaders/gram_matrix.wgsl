// Partial Gram matrices on matrix units: G = ZᵀZ over some tokens, lower triangle, with f32's accuracy. The fast twin of
// gram.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32. shared/gram_tile.wgsl says what Z and G are.
//
// The values of a part are brought into f16's range by the least of its tokens' scales (row_scale.wgsl) and split by
// mask into a high and a low part of 11 bits each; the products of two low parts are left out. The unit's accumulator
// truncates, so it sums only DEPTH tokens before they are added in f32.

enable f16;
enable wgpu_cooperative_matrix;

#import shared/params
#import shared/halves
#import shared/gram_tile

// A row of a tile, in vectors of 4. Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = QUADS + 2u;

// One array, so that every part of it lies on 16 bytes, which loads of matrices need. [token][column / 4]
const ROW_HIGH: u32 = 0u;
const ROW_LOW: u32 = ROW_HIGH + DEPTH * STRIDE;
const COLUMN_HIGH: u32 = ROW_LOW + DEPTH * STRIDE;
const COLUMN_LOW: u32 = COLUMN_HIGH + DEPTH * STRIDE;
const TILE_LEN: u32 = COLUMN_LOW + DEPTH * STRIDE;
var<workgroup> tile: array<vec4<f16>, TILE_LEN>;

fn put(high_at: u32, low_at: u32, value: vec4<f32>) {
    let halves = split(value);
    tile[high_at] = halves.high;
    tile[low_at] = halves.low;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // Matrix operations allow no early return: workgroups past the end repeat the last one's work.
    let work = work_table[min(work_index(workgroup), arrayLength(&work_table) - 1u)];
    let job = jobs[work.x];
    let first_row = work.y * TILE;
    let first_column = work.z * TILE;
    let start = work.w * job.part_tokens;
    let end = min(start + job.part_tokens, job.tokens);

    let scale = scale_of_part(job, start, end, t);
    let token_at = t / QUADS;
    let quad = t % QUADS;
    let place = token_at * STRIDE + quad;
    let row_at = first_row + quad * 4u;
    let column_at = first_column + quad * 4u;
    // Each subgroup has 32 × 64 of the tile.
    let tile_row = subgroup / 2u * 32u;
    let tile_column = subgroup % 2u * 64u;

    var c00: coop_mat16x16<f32, C>;
    var c10: coop_mat16x16<f32, C>;
    var c01: coop_mat16x16<f32, C>;
    var c11: coop_mat16x16<f32, C>;
    var c02: coop_mat16x16<f32, C>;
    var c12: coop_mat16x16<f32, C>;
    var c03: coop_mat16x16<f32, C>;
    var c13: coop_mat16x16<f32, C>;
    for (var token = start; token < end; token += DEPTH) {
        let at = token + token_at;
        let r0 = fetch(job, at + 0u * STEP, end, row_at);
        let r1 = fetch(job, at + 1u * STEP, end, row_at);
        let r2 = fetch(job, at + 2u * STEP, end, row_at);
        let r3 = fetch(job, at + 3u * STEP, end, row_at);
        let k0 = fetch(job, at + 0u * STEP, end, column_at);
        let k1 = fetch(job, at + 1u * STEP, end, column_at);
        let k2 = fetch(job, at + 2u * STEP, end, column_at);
        let k3 = fetch(job, at + 3u * STEP, end, column_at);
        workgroupBarrier();
        put(ROW_HIGH + place + 0u * STEP * STRIDE, ROW_LOW + place + 0u * STEP * STRIDE, r0 * scale);
        put(ROW_HIGH + place + 1u * STEP * STRIDE, ROW_LOW + place + 1u * STEP * STRIDE, r1 * scale);
        put(ROW_HIGH + place + 2u * STEP * STRIDE, ROW_LOW + place + 2u * STEP * STRIDE, r2 * scale);
        put(ROW_HIGH + place + 3u * STEP * STRIDE, ROW_LOW + place + 3u * STEP * STRIDE, r3 * scale);
        put(COLUMN_HIGH + place + 0u * STEP * STRIDE, COLUMN_LOW + place + 0u * STEP * STRIDE, k0 * scale);
        put(COLUMN_HIGH + place + 1u * STEP * STRIDE, COLUMN_LOW + place + 1u * STEP * STRIDE, k1 * scale);
        put(COLUMN_HIGH + place + 2u * STEP * STRIDE, COLUMN_LOW + place + 2u * STEP * STRIDE, k2 * scale);
        put(COLUMN_HIGH + place + 3u * STEP * STRIDE, COLUMN_LOW + place + 3u * STEP * STRIDE, k3 * scale);
        workgroupBarrier();
        // Rows 0 and 1 of matrices, in the first (a) and second half (b) of the depth.
        let stride = STRIDE;
        let rows_at = tile_row / 4u;
        let high_at0a = ROW_HIGH + rows_at;
        let high0a = coopLoad<coop_mat16x16<f16, A>>(&tile[high_at0a], stride);
        let low_at0a = ROW_LOW + rows_at;
        let low0a = coopLoad<coop_mat16x16<f16, A>>(&tile[low_at0a], stride);
        let high_at0b = ROW_HIGH + rows_at + 16u * STRIDE;
        let high0b = coopLoad<coop_mat16x16<f16, A>>(&tile[high_at0b], stride);
        let low_at0b = ROW_LOW + rows_at + 16u * STRIDE;
        let low0b = coopLoad<coop_mat16x16<f16, A>>(&tile[low_at0b], stride);
        let high_at1a = ROW_HIGH + rows_at + 4u;
        let high1a = coopLoad<coop_mat16x16<f16, A>>(&tile[high_at1a], stride);
        let low_at1a = ROW_LOW + rows_at + 4u;
        let low1a = coopLoad<coop_mat16x16<f16, A>>(&tile[low_at1a], stride);
        let high_at1b = ROW_HIGH + rows_at + 4u + 16u * STRIDE;
        let high1b = coopLoad<coop_mat16x16<f16, A>>(&tile[high_at1b], stride);
        let low_at1b = ROW_LOW + rows_at + 4u + 16u * STRIDE;
        let low1b = coopLoad<coop_mat16x16<f16, A>>(&tile[low_at1b], stride);
        // Matrices come column by column, and small terms first.
        let columns_at = tile_column / 4u;
        let column_high_at0a = COLUMN_HIGH + columns_at;
        let column_high0a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at0a], stride);
        let column_low_at0a = COLUMN_LOW + columns_at;
        let column_low0a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at0a], stride);
        let column_high_at0b = COLUMN_HIGH + columns_at + 16u * STRIDE;
        let column_high0b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at0b], stride);
        let column_low_at0b = COLUMN_LOW + columns_at + 16u * STRIDE;
        let column_low0b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at0b], stride);
        var s00: coop_mat16x16<f32, C>;
        var s10: coop_mat16x16<f32, C>;
        s00 = coopMultiplyAdd(low0a, column_high0a, s00);
        s10 = coopMultiplyAdd(low1a, column_high0a, s10);
        s00 = coopMultiplyAdd(low0b, column_high0b, s00);
        s10 = coopMultiplyAdd(low1b, column_high0b, s10);
        s00 = coopMultiplyAdd(high0a, column_low0a, s00);
        s10 = coopMultiplyAdd(high1a, column_low0a, s10);
        s00 = coopMultiplyAdd(high0b, column_low0b, s00);
        s10 = coopMultiplyAdd(high1b, column_low0b, s10);
        s00 = coopMultiplyAdd(high0a, column_high0a, s00);
        s10 = coopMultiplyAdd(high1a, column_high0a, s10);
        s00 = coopMultiplyAdd(high0b, column_high0b, s00);
        s10 = coopMultiplyAdd(high1b, column_high0b, s10);
        c00 = c00 + s00;
        c10 = c10 + s10;
        let column_high_at1a = COLUMN_HIGH + columns_at + 4u;
        let column_high1a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at1a], stride);
        let column_low_at1a = COLUMN_LOW + columns_at + 4u;
        let column_low1a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at1a], stride);
        let column_high_at1b = COLUMN_HIGH + columns_at + 4u + 16u * STRIDE;
        let column_high1b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at1b], stride);
        let column_low_at1b = COLUMN_LOW + columns_at + 4u + 16u * STRIDE;
        let column_low1b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at1b], stride);
        var s01: coop_mat16x16<f32, C>;
        var s11: coop_mat16x16<f32, C>;
        s01 = coopMultiplyAdd(low0a, column_high1a, s01);
        s11 = coopMultiplyAdd(low1a, column_high1a, s11);
        s01 = coopMultiplyAdd(low0b, column_high1b, s01);
        s11 = coopMultiplyAdd(low1b, column_high1b, s11);
        s01 = coopMultiplyAdd(high0a, column_low1a, s01);
        s11 = coopMultiplyAdd(high1a, column_low1a, s11);
        s01 = coopMultiplyAdd(high0b, column_low1b, s01);
        s11 = coopMultiplyAdd(high1b, column_low1b, s11);
        s01 = coopMultiplyAdd(high0a, column_high1a, s01);
        s11 = coopMultiplyAdd(high1a, column_high1a, s11);
        s01 = coopMultiplyAdd(high0b, column_high1b, s01);
        s11 = coopMultiplyAdd(high1b, column_high1b, s11);
        c01 = c01 + s01;
        c11 = c11 + s11;
        let column_high_at2a = COLUMN_HIGH + columns_at + 8u;
        let column_high2a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at2a], stride);
        let column_low_at2a = COLUMN_LOW + columns_at + 8u;
        let column_low2a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at2a], stride);
        let column_high_at2b = COLUMN_HIGH + columns_at + 8u + 16u * STRIDE;
        let column_high2b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at2b], stride);
        let column_low_at2b = COLUMN_LOW + columns_at + 8u + 16u * STRIDE;
        let column_low2b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at2b], stride);
        var s02: coop_mat16x16<f32, C>;
        var s12: coop_mat16x16<f32, C>;
        s02 = coopMultiplyAdd(low0a, column_high2a, s02);
        s12 = coopMultiplyAdd(low1a, column_high2a, s12);
        s02 = coopMultiplyAdd(low0b, column_high2b, s02);
        s12 = coopMultiplyAdd(low1b, column_high2b, s12);
        s02 = coopMultiplyAdd(high0a, column_low2a, s02);
        s12 = coopMultiplyAdd(high1a, column_low2a, s12);
        s02 = coopMultiplyAdd(high0b, column_low2b, s02);
        s12 = coopMultiplyAdd(high1b, column_low2b, s12);
        s02 = coopMultiplyAdd(high0a, column_high2a, s02);
        s12 = coopMultiplyAdd(high1a, column_high2a, s12);
        s02 = coopMultiplyAdd(high0b, column_high2b, s02);
        s12 = coopMultiplyAdd(high1b, column_high2b, s12);
        c02 = c02 + s02;
        c12 = c12 + s12;
        let column_high_at3a = COLUMN_HIGH + columns_at + 12u;
        let column_high3a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at3a], stride);
        let column_low_at3a = COLUMN_LOW + columns_at + 12u;
        let column_low3a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at3a], stride);
        let column_high_at3b = COLUMN_HIGH + columns_at + 12u + 16u * STRIDE;
        let column_high3b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_high_at3b], stride);
        let column_low_at3b = COLUMN_LOW + columns_at + 12u + 16u * STRIDE;
        let column_low3b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_low_at3b], stride);
        var s03: coop_mat16x16<f32, C>;
        var s13: coop_mat16x16<f32, C>;
        s03 = coopMultiplyAdd(low0a, column_high3a, s03);
        s13 = coopMultiplyAdd(low1a, column_high3a, s13);
        s03 = coopMultiplyAdd(low0b, column_high3b, s03);
        s13 = coopMultiplyAdd(low1b, column_high3b, s13);
        s03 = coopMultiplyAdd(high0a, column_low3a, s03);
        s13 = coopMultiplyAdd(high1a, column_low3a, s13);
        s03 = coopMultiplyAdd(high0b, column_low3b, s03);
        s13 = coopMultiplyAdd(high1b, column_low3b, s13);
        s03 = coopMultiplyAdd(high0a, column_high3a, s03);
        s13 = coopMultiplyAdd(high1a, column_high3a, s13);
        s03 = coopMultiplyAdd(high0b, column_high3b, s03);
        s13 = coopMultiplyAdd(high1b, column_high3b, s13);
        c03 = c03 + s03;
        c13 = c13 + s13;
    }

    let patch_at = subgroup * 256u;
    let patch_stride = 16u;
    let out_row = first_row + tile_row;
    let out_column = first_column + tile_column;
    let inverse = inverse_of(scale);
    coopStoreT(c00, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column, subgroup, lane, inverse);
    coopStoreT(c10, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column, subgroup, lane, inverse);
    coopStoreT(c01, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column + 16u, subgroup, lane, inverse);
    coopStoreT(c11, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column + 16u, subgroup, lane, inverse);
    coopStoreT(c02, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column + 32u, subgroup, lane, inverse);
    coopStoreT(c12, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column + 32u, subgroup, lane, inverse);
    coopStoreT(c03, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row, out_column + 48u, subgroup, lane, inverse);
    coopStoreT(c13, &patches[patch_at], patch_stride);
    store_patch(job, work.w, out_row + 16u, out_column + 48u, subgroup, lane, inverse);
}
