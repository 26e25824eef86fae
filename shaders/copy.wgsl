// Copies whole vectors: `copy_buffer_to_buffer` reaches a fifth of an H200's bandwidth.
//
// A workgroup for each CHUNK vectors, numbered through. Bindings: 3 source, 4 destination.

#import shared/line

struct Job {
    vectors: u32,
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> destination: array<vec4<u32>>;

const CHUNK: u32 = 1024u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let first = workgroup_number(workgroup, workgroups) * CHUNK + t;
    for (var e = first; e < min(first + CHUNK, jobs[0].vectors); e += 256u) {
        destination[e] = source[e];
    }
}
