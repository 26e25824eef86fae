// Classifier-free guidance, in place: c += ω·(c - u), so c becomes (1 + ω)·c - ω·u.
//
// A workgroup for each CHUNK words, numbered through. Bindings: 3 c as raw words, 4 u as raw words.
// The permutation sets DTYPE. The half beyond an odd length is written as it was.

#import shared/line
#import shared/words
#import shared/pack

struct Job {
    c: u32,         // first word
    u: u32,         // first word
    len: u32,       // elements
    scale: f32,     // ω
}

@group(0) @binding(1) var<storage, read> jobs: array<Job>;
@group(0) @binding(3) var<storage, read_write> conditional: array<u32>;
@group(0) @binding(4) var<storage, read> unconditional: array<u32>;

const CHUNK: u32 = 256u;

@compute @workgroup_size(CHUNK)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let job = jobs[0];
    let word = workgroup_number(workgroup, workgroups) * CHUNK + t;
    if (DTYPE == F32) {
        if (word < job.len) {
            let c = bitcast<f32>(conditional[job.c + word]);
            let u = bitcast<f32>(unconditional[job.u + word]);
            conditional[job.c + word] = bitcast<u32>(fma(job.scale, c - u, c));
        }
    } else if (word * 2u < job.len) {
        let old = conditional[job.c + word];
        let c = unpack_halves(old, DTYPE);
        let u = unpack_halves(unconditional[job.u + word], DTYPE);
        var changed = pack_halves(fma(vec2<f32>(job.scale), c - u, c), DTYPE);
        if (word * 2u + 1u == job.len) {
            changed = (changed & 0xffffu) | (old & 0xffff0000u);
        }
        conditional[job.c + word] = changed;
    }
}
