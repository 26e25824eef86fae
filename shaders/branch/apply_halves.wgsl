// branch/apply.wgsl for features of 16 bits on matrix units, in one product of halves: F0 += Z·B_catᵀ, in place, rounded
// once to the type of F0; branch/choose.wgsl has weighed Z.
//
//   F0: tokens × width in f16 or bf16; width a multiple of 8
//
// Two lanes have a row of 16 channels. Grid: (token tile, part of the channels). Bindings: 5 F0; see
// branch/shared/block.wgsl. The permutation sets DTYPE and DEPTH.

enable f16;

#import shared/words
#import shared/pack
#import shared/halves
#import shared/row_lanes
#import branch/shared/features_halves
#import branch/shared/job
#import branch/shared/split

@group(0) @binding(5) var<storage, read_write> f0: array<vec4<u32>>;

#import branch/shared/block
#import multiply

fn added(f: vec4<u32>, row: u32) -> vec4<u32> {
    let at = subgroup * OUT_LEN + row * OUT_STRIDE + lane % 2u * 2u;
    let inverse = inverses[row];
    let left = narrowed(widened(f.xy) + sums[at] * inverse);
    let right = narrowed(widened(f.zw) + sums[at + 1u] * inverse);
    return vec4<u32>(left, right);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) work: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
    locate(thread, subgroup_id, subgroup_lane);
    let job = jobs[0];
    let first_token = job.first + work.x * TOKENS;
    stage_z(job, 0u, job.columns, first_token, 0u, 0u);
    workgroupBarrier();
    let row = lane / 2u;
    let left = job.first + job.count - first_token;
    let upper = job.f0 / 4u + (first_token - job.first + row) * (job.width / 8u);
    let lower = upper + 16u * (job.width / 8u);
    let start = work.y * job.part_width;
    let stop = min(start + job.part_width, job.width);
    for (var base = start; base < stop; base += SUBGROUPS * CHANNELS) {
        let block = base + subgroup * CHANNELS;
        let channel = block + lane % 2u * 8u;
        let has_upper = channel < stop && row < left;
        let has_lower = channel < stop && row + 16u < left;
        var f: vec4<u32>;
        var g: vec4<u32>;
        if (has_upper) {
            f = f0[upper + channel / 8u];
        }
        if (has_lower) {
            g = f0[lower + channel / 8u];
        }
        multiply(job, min(block, job.width - 1u) / CHANNELS, 0u, job.columns, 0u);
        meet();
        if (has_upper) {
            f0[upper + channel / 8u] = added(f, row);
        }
        if (has_lower) {
            f0[lower + channel / 8u] = added(g, row + 16u);
        }
        meet();
    }
}
