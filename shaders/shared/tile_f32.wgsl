// An outer-product accumulator in registers: each thread holds 8 rows × COLUMNS (4 or 8) columns of a
// tile, as named vectors, since arrays of vectors spill on several compilers.
// The permutation sets COLUMNS, and THREADS_N: threads side by side, a multiple of 8.

// Which 4 rows, and which 4 columns, of each half of the tile a thread holds: 32 neighbouring threads form
// 4 × 8, so that what they read of workgroup memory is little and mostly shared.
fn tile_row_quad(t: u32) -> u32 {
    return t % 32u / 8u + t / 32u / (THREADS_N / 8u) * 4u;
}

fn tile_column_quad(t: u32) -> u32 {
    return t % 8u + t / 32u % (THREADS_N / 8u) * 8u;
}

var<private> c0: vec4<f32>;
var<private> c1: vec4<f32>;
var<private> c2: vec4<f32>;
var<private> c3: vec4<f32>;
var<private> c4: vec4<f32>;
var<private> c5: vec4<f32>;
var<private> c6: vec4<f32>;
var<private> c7: vec4<f32>;
var<private> d0: vec4<f32>;
var<private> d1: vec4<f32>;
var<private> d2: vec4<f32>;
var<private> d3: vec4<f32>;
var<private> d4: vec4<f32>;
var<private> d5: vec4<f32>;
var<private> d6: vec4<f32>;
var<private> d7: vec4<f32>;

// C += [low; high]·leftᵀ and, with 8 columns, D += [low; high]·rightᵀ
fn tile_step(low: vec4<f32>, high: vec4<f32>, left: vec4<f32>, right: vec4<f32>) {
    c0 = fma(vec4<f32>(low.x), left, c0);
    c1 = fma(vec4<f32>(low.y), left, c1);
    c2 = fma(vec4<f32>(low.z), left, c2);
    c3 = fma(vec4<f32>(low.w), left, c3);
    c4 = fma(vec4<f32>(high.x), left, c4);
    c5 = fma(vec4<f32>(high.y), left, c5);
    c6 = fma(vec4<f32>(high.z), left, c6);
    c7 = fma(vec4<f32>(high.w), left, c7);
    if (COLUMNS == 8u) {
        d0 = fma(vec4<f32>(low.x), right, d0);
        d1 = fma(vec4<f32>(low.y), right, d1);
        d2 = fma(vec4<f32>(low.z), right, d2);
        d3 = fma(vec4<f32>(low.w), right, d3);
        d4 = fma(vec4<f32>(high.x), right, d4);
        d5 = fma(vec4<f32>(high.y), right, d5);
        d6 = fma(vec4<f32>(high.z), right, d6);
        d7 = fma(vec4<f32>(high.w), right, d7);
    }
}
