// What memory can do: each invocation copies four vectors.

@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> destination: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = workgroup.x * 1024u + t;
    let v0 = source[i];
    let v1 = source[i + 256u];
    let v2 = source[i + 512u];
    let v3 = source[i + 768u];
    destination[i] = v0;
    destination[i + 256u] = v1;
    destination[i + 512u] = v2;
    destination[i + 768u] = v3;
}
