// Rank concatenation: copies factors of several adapters, widened to f32 and scaled, into one matrix.
//
//   A_cat = [A_1; …; A_K]      B_cat = [s_1·B_1 … s_K·B_K]
//
// A job is one factor: a row-major rows × cols matrix of f32, f16 or bf16 that goes to a place in a
// wider matrix. Work: (job, first element). Each workgroup copies CHUNK elements.
// Bindings: 3 sources as raw words, 4 target.

#import shared/params
#import shared/words

struct Job {
    source: u32,    // first word
    dtype: u32,
    rows: u32,
    cols: u32,
    destination: u32,   // first element
    stride: u32,    // elements from one row of the target to the next
    scale: f32,
}

@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read_write> joined: array<f32>;

const CHUNK: u32 = 4096u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (!has_work(workgroup)) {
        return;
    }
    let work = work_table[work_index(workgroup)];
    let job = jobs[work.x];
    let end = min(work.y + CHUNK, job.rows * job.cols);
    for (var e = work.y + t; e < end; e += 256u) {
        var value: f32;
        if (job.dtype == F32) {
            value = bitcast<f32>(words[job.source + e]);
        } else {
            let pair = unpack_halves(words[job.source + e / 2u], job.dtype);
            value = select(pair.x, pair.y, (e & 1u) == 1u);
        }
        let row = e / job.cols;
        joined[job.destination + row * job.stride + (e - row * job.cols)] = value * job.scale;
    }
}
