// Partial Gram matrices on matrix units with values of 11 bits: G = ZᵀZ over some tokens, lower triangle. The quick twin of
// gram_matrix.wgsl for adapters as it needs. shared/gram_tile.wgsl says what Z and G are.
//
// The values of a part are brought into f16's range by the least of its tokens' scales (row_scale.wgsl) and rounded to
// f16; the unit sums the whole part, and truncates.

enable f16;
enable wgpu_cooperative_matrix;

#import shared/params
#import shared/gram_tile

// A row of a tile, in vectors of 4. Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = QUADS + 2u;

// One array, so that every part of it lies on 16 bytes, which loads of matrices need. [token][column / 4]
const OF_ROWS: u32 = 0u;
const OF_COLUMNS: u32 = OF_ROWS + DEPTH * STRIDE;
var<workgroup> tile: array<vec4<f16>, 2u * DEPTH * STRIDE>;

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
        tile[OF_ROWS + place + 0u * STEP * STRIDE] = vec4<f16>(r0 * scale);
        tile[OF_ROWS + place + 1u * STEP * STRIDE] = vec4<f16>(r1 * scale);
        tile[OF_ROWS + place + 2u * STEP * STRIDE] = vec4<f16>(r2 * scale);
        tile[OF_ROWS + place + 3u * STEP * STRIDE] = vec4<f16>(r3 * scale);
        tile[OF_COLUMNS + place + 0u * STEP * STRIDE] = vec4<f16>(k0 * scale);
        tile[OF_COLUMNS + place + 1u * STEP * STRIDE] = vec4<f16>(k1 * scale);
        tile[OF_COLUMNS + place + 2u * STEP * STRIDE] = vec4<f16>(k2 * scale);
        tile[OF_COLUMNS + place + 3u * STEP * STRIDE] = vec4<f16>(k3 * scale);
        workgroupBarrier();
        // Matrices 0 and 1 of rows, 0 to 3 of columns, in the first (a) and second half (b) of the depth.
        let stride = STRIDE;
        let row_at0a = OF_ROWS + tile_row / 4u;
        let row0a = coopLoad<coop_mat16x16<f16, A>>(&tile[row_at0a], stride);
        let row_at1a = OF_ROWS + tile_row / 4u + 4u;
        let row1a = coopLoad<coop_mat16x16<f16, A>>(&tile[row_at1a], stride);
        let row_at0b = OF_ROWS + tile_row / 4u + 16u * STRIDE;
        let row0b = coopLoad<coop_mat16x16<f16, A>>(&tile[row_at0b], stride);
        let row_at1b = OF_ROWS + tile_row / 4u + 4u + 16u * STRIDE;
        let row1b = coopLoad<coop_mat16x16<f16, A>>(&tile[row_at1b], stride);
        let column_at0a = OF_COLUMNS + tile_column / 4u;
        let column0a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at0a], stride);
        let column_at0b = OF_COLUMNS + tile_column / 4u + 16u * STRIDE;
        let column0b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at0b], stride);
        c00 = coopMultiplyAdd(row0a, column0a, c00);
        c10 = coopMultiplyAdd(row1a, column0a, c10);
        c00 = coopMultiplyAdd(row0b, column0b, c00);
        c10 = coopMultiplyAdd(row1b, column0b, c10);
        let column_at1a = OF_COLUMNS + tile_column / 4u + 4u;
        let column1a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at1a], stride);
        let column_at1b = OF_COLUMNS + tile_column / 4u + 4u + 16u * STRIDE;
        let column1b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at1b], stride);
        c01 = coopMultiplyAdd(row0a, column1a, c01);
        c11 = coopMultiplyAdd(row1a, column1a, c11);
        c01 = coopMultiplyAdd(row0b, column1b, c01);
        c11 = coopMultiplyAdd(row1b, column1b, c11);
        let column_at2a = OF_COLUMNS + tile_column / 4u + 8u;
        let column2a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at2a], stride);
        let column_at2b = OF_COLUMNS + tile_column / 4u + 8u + 16u * STRIDE;
        let column2b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at2b], stride);
        c02 = coopMultiplyAdd(row0a, column2a, c02);
        c12 = coopMultiplyAdd(row1a, column2a, c12);
        c02 = coopMultiplyAdd(row0b, column2b, c02);
        c12 = coopMultiplyAdd(row1b, column2b, c12);
        let column_at3a = OF_COLUMNS + tile_column / 4u + 12u;
        let column3a = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at3a], stride);
        let column_at3b = OF_COLUMNS + tile_column / 4u + 12u + 16u * STRIDE;
        let column3b = coopLoadT<coop_mat16x16<f16, B>>(&tile[column_at3b], stride);
        c03 = coopMultiplyAdd(row0a, column3a, c03);
        c13 = coopMultiplyAdd(row1a, column3a, c13);
        c03 = coopMultiplyAdd(row0b, column3b, c03);
        c13 = coopMultiplyAdd(row1b, column3b, c13);
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
