// What arithmetic can do: eight independent chains of fused multiply-adds of four lanes each, in registers.
// SCALAR is f32 or f64; STEPS times 4 x 8 x 4 fused multiply-adds in an invocation.

// What multiplies and what is added: not known to the compiler.
@group(0) @binding(0) var<storage, read> source: array<SCALAR>;
@group(0) @binding(1) var<storage, read_write> destination: array<SCALAR>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let m = vec4<SCALAR>(source[0]);
    let c = vec4<SCALAR>(source[1]);
    var v0 = vec4<SCALAR>(SCALAR(id.x));
    var v1 = v0 + c;
    var v2 = v1 + c;
    var v3 = v2 + c;
    var v4 = v3 + c;
    var v5 = v4 + c;
    var v6 = v5 + c;
    var v7 = v6 + c;
    for (var i = 0u; i < STEPSu; i++) {
        for (var j = 0u; j < 4u; j++) {
            v0 = fma(v0, m, c);
            v1 = fma(v1, m, c);
            v2 = fma(v2, m, c);
            v3 = fma(v3, m, c);
            v4 = fma(v4, m, c);
            v5 = fma(v5, m, c);
            v6 = fma(v6, m, c);
            v7 = fma(v7, m, c);
        }
    }
    let sum = v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7;
    // Never so, but the compiler cannot know.
    if (sum.x + sum.y + sum.z + sum.w == SCALAR(-1.0)) {
        destination[0] = sum.x;
    }
}
