// branch/apply.wgsl on matrix units: F0 += Z·B_catᵀ, in place, rounded once to the type of F0; branch/choose.wgsl has
// weighed Z.
//
//   F0: tokens × width in f32, f16 or bf16; width a multiple of 4
//
// Grid: (token tile, part of the channels). Bindings: 5 F0; see branch/shared/tile_matrix.wgsl.
// The permutation sets DTYPE and the tile.

enable f16;

#import shared/words
#import shared/pack
#import shared/halves
#import shared/row_lanes
#import features
#import branch/shared/job
#import branch/shared/split

@group(0) @binding(5) var<storage, read_write> f0: array<Raw>;

#import branch/shared/tile_matrix
#import multiply

fn store(job: Job, first_token: u32, row: u32, part: Part, channel: u32, f: Channels) {
    let left = channel + lane % 8u * 4u;
    let place = part.place + channel / 4u;
    if (first_token + subgroup * 16u + lane / 8u + row >= job.first + job.count) {
        return;
    }
    if (left < job.width) {
        f0[place] = narrowed(widened(f.left) + left_product(part));
    }
    if (left + 32u < job.width) {
        f0[place + 8u] = narrowed(widened(f.right) + right_product(part));
    }
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
    let start = work.y * job.part_width;
    let end = min(start + job.part_width, job.width);
    let columns = Columns(0u, job.columns);
    let factors = stage_z(job, columns, first_token);
    let part0 = part(job, first_token, 0u, factors.x);
    let part1 = part(job, first_token, 4u, factors.y);
    let part2 = part(job, first_token, 8u, factors.z);
    let part3 = part(job, first_token, 12u, factors.w);
    fetch_b(job, columns, start);
    for (var channel = start; channel < end; channel += CHANNELS) {
        let tile0 = features(job, part0, channel);
        let tile1 = features(job, part1, channel);
        let tile2 = features(job, part2, channel);
        let tile3 = features(job, part3, channel);
        tile_product(job, columns, min(channel + CHANNELS, end - 1u) / CHANNELS * CHANNELS);
        store(job, first_token, 0u, part0, channel, tile0);
        store(job, first_token, 4u, part1, channel, tile1);
        store(job, first_token, 8u, part2, channel, tile2);
        store(job, first_token, 12u, part3, channel, tile3);
    }
}
