// What matrix units can do: in each of eight subgroups of 32, eight independent chains of 16 x 16 x 16 products of f16 that
// are summed in f32. STEPS times 8 products in a subgroup.

enable f16;
enable wgpu_cooperative_matrix;

@group(0) @binding(0) var<storage, read> source: array<f32>;
@group(0) @binding(1) var<storage, read_write> destination: array<f32>;

// Four operands on the left, two on the right.
var<workgroup> tile: array<f16, 1536>;
var<workgroup> patches: array<f32, 2048>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) t: u32, @builtin(subgroup_id) subgroup: u32) {
    for (var i = t; i < 1536u; i += 256u) {
        tile[i] = f16(source[i % 2u]) / f16(i + 1u);
    }
    workgroupBarrier();
    let stride = 16u;
    let a0 = coopLoadT<coop_mat16x16<f16, A>>(&tile[0], stride);
    let a1 = coopLoadT<coop_mat16x16<f16, A>>(&tile[256], stride);
    let a2 = coopLoadT<coop_mat16x16<f16, A>>(&tile[512], stride);
    let a3 = coopLoadT<coop_mat16x16<f16, A>>(&tile[768], stride);
    let b0 = coopLoad<coop_mat16x16<f16, B>>(&tile[1024], stride);
    let b1 = coopLoad<coop_mat16x16<f16, B>>(&tile[1280], stride);
    var c00: coop_mat16x16<f32, C>;
    var c01: coop_mat16x16<f32, C>;
    var c10: coop_mat16x16<f32, C>;
    var c11: coop_mat16x16<f32, C>;
    var c20: coop_mat16x16<f32, C>;
    var c21: coop_mat16x16<f32, C>;
    var c30: coop_mat16x16<f32, C>;
    var c31: coop_mat16x16<f32, C>;
    for (var i = 0u; i < STEPSu; i++) {
        c00 = coopMultiplyAdd(a0, b0, c00);
        c01 = coopMultiplyAdd(a0, b1, c01);
        c10 = coopMultiplyAdd(a1, b0, c10);
        c11 = coopMultiplyAdd(a1, b1, c11);
        c20 = coopMultiplyAdd(a2, b0, c20);
        c21 = coopMultiplyAdd(a2, b1, c21);
        c30 = coopMultiplyAdd(a3, b0, c30);
        c31 = coopMultiplyAdd(a3, b1, c31);
    }
    c00 = c00 + c01;
    c10 = c10 + c11;
    c20 = c20 + c21;
    c30 = c30 + c31;
    c00 = c00 + c10;
    c20 = c20 + c30;
    c00 = c00 + c20;
    let place = subgroup * 256u;
    coopStoreT(c00, &patches[place], stride);
    workgroupBarrier();
    // Never so, but the compiler cannot know.
    if (patches[t] == -1.0) {
        destination[0] = patches[t];
    }
}
