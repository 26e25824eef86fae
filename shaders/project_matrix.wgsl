// Z = X·Aᵀ on matrix units: f16 operands and f32 sums that keep f32's accuracy. The fast twin of
// project.wgsl, for adapters with 16×16×16 f16 to f32 matrices and subgroups of 32.
//
//   X: tokens × width, row-major, f32, f16 or bf16      A: rank × width, f32      width: a multiple of 8
//
// Rows of X, but for f16, are brought into f16's range by powers of two, each workgroup finding those of its rows in its
// part of the width; A comes ready from split_rows.wgsl, in whole tiles. sum_parts.wgsl takes the powers out again.
// f16 and bf16 values are then exact in f16 (short of 2^-38 of the largest of their row); f32 values are split
// by mask into a high and a low part of 11 bits each, and the products of two low parts left out. Where A came
// from halves it has no low part, which halves the work. The unit's accumulator truncates, so it sums only
// DEPTH products before they are added in f32.
//
// Work: (job, token tile, rank tile, part). A workgroup makes one TILE_M × TILE_N tile of one part of the width and
// leaves it, scaled as it is, in `parts`: for each part of the width a matrix of whole tiles, `stride` columns wide. The
// scales of X stand there too: a column for each part.
// Bindings: 3 X as raw words, 4 high and 5 low parts of A, 6 parts, 7 scales of rows of A.
// The permutation sets DTYPE and TILE_N, 32 or 64. A subgroup has 32 × 32 of the tile.

enable f16;
enable wgpu_cooperative_matrix;

#import shared/params
#import shared/words
#import shared/halves
#import shared/row_lanes

struct Job {
    x: u32,     // first word, a multiple of 4
    a: u32,     // first element of high and of low, a multiple of 4
    z: u32,     // first element in parts
    tokens: u32,
    rank: u32,
    width: u32,
    stride: u32,
    part_width: u32,    // a multiple of DEPTH
    a_stride: u32,  // elements of a row of high and of low, a multiple of DEPTH
    x_scales: u32,  // first element in parts; of f16 none
    a_scales: u32,  // first element
}

@group(0) @binding(3) var<storage, read> x_words: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> a_high: array<vec4<f16>>;
@group(0) @binding(5) var<storage, read> a_low: array<vec4<f16>>;
@group(0) @binding(6) var<storage, read_write> parts: array<f32>;
@group(0) @binding(7) var<storage, read> scales: array<f32>;

const TILE_M: u32 = 128u;
const SUBGROUPS_N: u32 = TILE_N / 32u;
const THREADS: u32 = TILE_M * SUBGROUPS_N;
const DEPTH: u32 = 32u;
// A row of a tile, in vectors of 4. Padded rows keep the loads of a matrix from meeting in a bank, and stay on 16 bytes.
const STRIDE: u32 = DEPTH / 4u + 2u;

// Values of X in 16 bytes, the threads of a row, and how a tile of it is shared: each thread fetches X_LOADS times, X_STEP
// rows apart.
const X_VALUES: u32 = select(8u, 4u, DTYPE == F32);
const X_LANES: u32 = DEPTH / X_VALUES;
const X_STEP: u32 = THREADS / X_LANES;
const X_LOADS: u32 = TILE_M / X_STEP;
// The threads of a row of A fetch 4 values each, A_LOADS times.
const A_LANES: u32 = DEPTH / 4u;
const A_STEP: u32 = THREADS / A_LANES;
const A_LOADS: u32 = TILE_N / A_STEP;

// One array, so that every part of it lies on 16 bytes, which loads of matrices need.
const X_HIGH: u32 = 0u;
const A_HIGH: u32 = X_HIGH + TILE_M * STRIDE;
const A_LOW: u32 = A_HIGH + TILE_N * STRIDE;
const X_LOW: u32 = A_LOW + TILE_N * STRIDE;
const TILE_LEN: u32 = X_LOW + select(0u, TILE_M * STRIDE, DTYPE == F32);
var<workgroup> tile: array<vec4<f16>, TILE_LEN>;

// Whether any row of this tile of A has low parts: it goes through memory, for naga to see that all threads agree, and takes
// 16 bytes, so that the tile stays on them.
var<workgroup> low_rows: vec4<u32>;

fn halves(low: u32, high: u32, scale: f32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack_halves(low, DTYPE), unpack_halves(high, DTYPE)) * scale);
}

// Where in a row of the tile its vectors of 4 lie: even ones, then odd ones. X and A agree, so that products do not
// change, and 16 bytes of halves are stored where neighbours' stores do not meet in a bank.
fn slot(vector: u32) -> u32 {
    return vector % 2u * (DEPTH / 8u) + vector / 2u;
}

// Which row a group of threads stores, out of order for the same reason; `lanes`: threads of a row.
fn row_of(group: u32, lanes: u32) -> u32 {
    let i = group % 8u;
    return group - i + select(i % 2u * 4u + i / 2u, i % 4u * 2u + i / 4u, lanes == 4u);
}

fn put_x(row: u32, vector: u32, raw: vec4<u32>, scale: f32) {
    let place = row * STRIDE + slot(vector);
    if (DTYPE == F32) {
        let parts = split(bitcast<vec4<f32>>(raw) * scale);
        tile[X_HIGH + place] = parts.high;
        tile[X_LOW + place] = parts.low;
    } else {
        tile[X_HIGH + place] = halves(raw.x, raw.y, scale);
        tile[X_HIGH + place + slot(1u)] = halves(raw.z, raw.w, scale);
    }
}

fn largest(raw: vec4<u32>) -> vec4<u32> {
    if (DTYPE == F32) {
        return exponents(raw);
    }
    return max(exponents(raw), exponents(raw << vec4<u32>(16u)));
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // What shares a row must share a subgroup.
    let t = subgroup * 32u + lane;
    // Matrix operations allow no early return: workgroups past the end repeat the last one's work.
    let work = work_table[min(work_index(workgroup), arrayLength(&work_table) - 1u)];
    let job = jobs[work.x];
    let first_row = work.y * TILE_M;
    let first_column = work.z * TILE_N;
    let start = work.w * job.part_width;
    let end = min(start + job.part_width, job.a_stride);

    // Rows past the end repeat the last, and vectors past the width the last there, where A is zero: nobody reads what
    // becomes of them.
    let x_row = row_of(t / X_LANES, X_LANES);
    let x_vector = t % X_LANES;
    let x_vectors = job.width / X_VALUES;
    var x_at: array<u32, X_LOADS>;
    var x_scales: array<f32, X_LOADS>;
    for (var i = 0u; i < X_LOADS; i++) {
        let row = min(first_row + x_row + i * X_STEP, job.tokens - 1u);
        x_at[i] = job.x / 4u + row * x_vectors;
        x_scales[i] = 1.0;
    }
    if (DTYPE != F16) {
        var most: array<vec4<u32>, X_LOADS>;
        for (var k = start; k < end; k += 2u * DEPTH) {
            let v = min(k / X_VALUES + x_vector, x_vectors - 1u);
            let w = min(v + X_LANES, x_vectors - 1u);
            for (var i = 0u; i < X_LOADS; i++) {
                most[i] = max(most[i], max(largest(x_words[x_at[i] + v]), largest(x_words[x_at[i] + w])));
            }
        }
        for (var i = 0u; i < X_LOADS; i++) {
            x_scales[i] = scale_of_row(most[i], X_LANES);
            let row = first_row + x_row + i * X_STEP;
            if (x_vector == 0u && work.z == 0u && row < job.tokens) {
                parts[job.x_scales + work.w * job.tokens + row] = x_scales[i];
            }
        }
    }
    let a_row = row_of(t / A_LANES, A_LANES);
    let a_vector = t % A_LANES;
    let a_place = a_row * STRIDE + slot(a_vector);
    let a_at = (job.a + (first_column + a_row) * job.a_stride) / 4u + a_vector;
    let a_step = A_STEP * job.a_stride / 4u;

    // Every subgroup finds the same.
    var low_row = false;
    for (var c = lane; c < TILE_N; c += 32u) {
        low_row = low_row || scales[job.a_scales + min(first_column + c, job.rank - 1u)] < 0.0;
    }
    let any_low = subgroupAny(low_row);
    if (t == 0u) {
        low_rows = vec4<u32>(u32(any_low));
    }
    let has_low = workgroupUniformLoad(&low_rows).x != 0u;

    let tile_row = subgroup / SUBGROUPS_N * 32u;
    let tile_column = subgroup % SUBGROUPS_N * 32u;
    let out_row = first_row + tile_row;
    let rows = (job.tokens + TILE_M - 1u) / TILE_M * TILE_M;
    let out = job.z + (work.w * rows + out_row) * job.stride + first_column + tile_column;

    var c00: coop_mat16x16<f32, C>;
    var c10: coop_mat16x16<f32, C>;
    var c01: coop_mat16x16<f32, C>;
    var c11: coop_mat16x16<f32, C>;
    for (var k = start; k < end; k += DEPTH) {
        // All fetches before all stores, which they would wait for one by one.
        var x: array<vec4<u32>, X_LOADS>;
        var high: array<vec4<f16>, A_LOADS>;
        var low: array<vec4<f16>, A_LOADS>;
        let v = min(k / X_VALUES + x_vector, x_vectors - 1u);
        for (var i = 0u; i < X_LOADS; i++) {
            x[i] = x_words[x_at[i] + v];
        }
        for (var i = 0u; i < A_LOADS; i++) {
            high[i] = a_high[a_at + i * a_step + k / 4u];
            if (has_low) {
                low[i] = a_low[a_at + i * a_step + k / 4u];
            }
        }
        workgroupBarrier();
        for (var i = 0u; i < X_LOADS; i++) {
            put_x(x_row + i * X_STEP, x_vector * X_VALUES / 4u, x[i], x_scales[i]);
        }
        for (var i = 0u; i < A_LOADS; i++) {
            let place = a_place + i * A_STEP * STRIDE;
            tile[A_HIGH + place] = high[i];
            if (has_low) {
                tile[A_LOW + place] = low[i];
            }
        }
        workgroupBarrier();
        let stride = STRIDE;
        let tile_at0 = X_HIGH + tile_row * STRIDE;
        let tile_at1 = tile_at0 + 16u * STRIDE;
        // Matrix rows 0 and 1 of X, in the first and second half of the depth.
        let tile_at0b = tile_at0 + 4u;
        let tile_at1b = tile_at1 + 4u;
        let x0a = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at0], stride);
        let x0b = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at0b], stride);
        let x1a = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at1], stride);
        let x1b = coopLoadT<coop_mat16x16<f16, A>>(&tile[tile_at1b], stride);
        var x0a_low: coop_mat16x16<f16, A>;
        var x0b_low: coop_mat16x16<f16, A>;
        var x1a_low: coop_mat16x16<f16, A>;
        var x1b_low: coop_mat16x16<f16, A>;
        if (DTYPE == F32) {
            let low_at0 = tile_at0 - X_HIGH + X_LOW;
            let low_at1 = tile_at1 - X_HIGH + X_LOW;
            let low_at0b = low_at0 + 4u;
            let low_at1b = low_at1 + 4u;
            x0a_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0], stride);
            x0b_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at0b], stride);
            x1a_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1], stride);
            x1b_low = coopLoadT<coop_mat16x16<f16, A>>(&tile[low_at1b], stride);
        }
        // Matrices come column by column, and small terms first.
        let column_at0 = tile_column * STRIDE;
        let high_at0a = A_HIGH + column_at0;
        let high_at0b = high_at0a + 4u;
        let high0a = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at0a], stride);
        let high0b = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at0b], stride);
        var s00: coop_mat16x16<f32, C>;
        var s10: coop_mat16x16<f32, C>;
        if (has_low) {
            let low_at0a = A_LOW + column_at0;
            let low_at0b = low_at0a + 4u;
            let low0a = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at0a], stride);
            let low0b = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at0b], stride);
            s00 = coopMultiplyAdd(x0a, low0a, s00);
            s10 = coopMultiplyAdd(x1a, low0a, s10);
            s00 = coopMultiplyAdd(x0b, low0b, s00);
            s10 = coopMultiplyAdd(x1b, low0b, s10);
        }
        if (DTYPE == F32) {
            s00 = coopMultiplyAdd(x0a_low, high0a, s00);
            s10 = coopMultiplyAdd(x1a_low, high0a, s10);
            s00 = coopMultiplyAdd(x0b_low, high0b, s00);
            s10 = coopMultiplyAdd(x1b_low, high0b, s10);
        }
        s00 = coopMultiplyAdd(x0a, high0a, s00);
        s10 = coopMultiplyAdd(x1a, high0a, s10);
        s00 = coopMultiplyAdd(x0b, high0b, s00);
        s10 = coopMultiplyAdd(x1b, high0b, s10);
        c00 = c00 + s00;
        c10 = c10 + s10;
        let column_at1 = (tile_column + 16u) * STRIDE;
        let high_at1a = A_HIGH + column_at1;
        let high_at1b = high_at1a + 4u;
        let high1a = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at1a], stride);
        let high1b = coopLoad<coop_mat16x16<f16, B>>(&tile[high_at1b], stride);
        var s01: coop_mat16x16<f32, C>;
        var s11: coop_mat16x16<f32, C>;
        if (has_low) {
            let low_at1a = A_LOW + column_at1;
            let low_at1b = low_at1a + 4u;
            let low1a = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at1a], stride);
            let low1b = coopLoad<coop_mat16x16<f16, B>>(&tile[low_at1b], stride);
            s01 = coopMultiplyAdd(x0a, low1a, s01);
            s11 = coopMultiplyAdd(x1a, low1a, s11);
            s01 = coopMultiplyAdd(x0b, low1b, s01);
            s11 = coopMultiplyAdd(x1b, low1b, s11);
        }
        if (DTYPE == F32) {
            s01 = coopMultiplyAdd(x0a_low, high1a, s01);
            s11 = coopMultiplyAdd(x1a_low, high1a, s11);
            s01 = coopMultiplyAdd(x0b_low, high1b, s01);
            s11 = coopMultiplyAdd(x1b_low, high1b, s11);
        }
        s01 = coopMultiplyAdd(x0a, high1a, s01);
        s11 = coopMultiplyAdd(x1a, high1a, s11);
        s01 = coopMultiplyAdd(x0b, high1b, s01);
        s11 = coopMultiplyAdd(x1b, high1b, s11);
        c01 = c01 + s01;
        c11 = c11 + s11;
    }
    let stride = job.stride;
    let out01 = out + 16u;
    let out10 = out + 16u * stride;
    let out11 = out10 + 16u;
    coopStoreT(c00, &parts[out], stride);
    coopStoreT(c01, &parts[out01], stride);
    coopStoreT(c10, &parts[out10], stride);
    coopStoreT(c11, &parts[out11], stride);
}
