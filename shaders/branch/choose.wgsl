// Makes of scores the weight of each branch on each token, and weighs Z by them, in place.
//
//   weights[token, k]: 1 for the largest score (the first of equals), or with SOFT its share of the sum
//   Z *= weight of its branch on its token, and the branch's factor: what branch/apply.wgsl multiplies
//
// FINISH: scores first, from the parts of stats. With NORMALISE a score counts in relation to the branch's running mean.
// Groups decide by their mean scores. FIXED: weights as the host says.
// It adds to the call's record of the log, whose place is said when the launch is recorded, how many tokens each branch won. Where the weight is zero Z becomes zero, also where the
// branch overflowed.
// Grid: a workgroup for TOKENS tokens. Bindings: 3 stats, 4 scores, 5 weights, 6 running means, 7 a record of the log, 8 Z, 9 controls.

#import branch/shared/job
#import shared/exp_log
#import branch/shared/state

@group(0) @binding(3) var<storage, read> stats: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> scores: array<f32>;
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;
@group(0) @binding(6) var<storage, read> running: array<f32>;
@group(0) @binding(7) var<storage, read_write> log_words: array<atomic<u32>>;
@group(0) @binding(8) var<storage, read_write> z: array<f32>;
@group(0) @binding(9) var<storage, read> controls: Controls;

#import branch/shared/finish

const THREADS: u32 = 256u;
const TOKENS: u32 = 16u;

// The scores by which the workgroup's tokens decide, then their weights.
var<workgroup> shares: array<f32, TOKENS * MAX_BRANCHES>;
var<workgroup> wins: array<atomic<u32>, MAX_BRANCHES>;

// The score by which a token decides.
fn decisive(job: Job, branch: u32, token: u32) -> f32 {
    if ((job.flags & FIXED) != 0u) {
        return job.fixed[branch];
    }
    var place = token * job.branches;
    if (job.group > 0u) {
        place = job.means + token / job.group * job.branches;
    }
    let score = scores[place + branch];
    if ((job.flags & NORMALISE) == 0u) {
        return score;
    }
    let mean = running[job.running + branch];
    return select(0.0, score / mean, mean > 0.0);
}

// The weight of one branch, with the scores of all in `shares` from `first` on; counts the token for its winner.
fn weight_of(job: Job, first: u32, branch: u32) -> f32 {
    var best = 0u;
    var most = shares[first];
    var sum = most;
    for (var k = 1u; k < job.branches; k++) {
        let value = shares[first + k];
        sum += value;
        if (value > most) {
            most = value;
            best = k;
        }
    }
    if (branch == 0u) {
        atomicAdd(&wins[best], 1u);
    }
    if ((job.flags & FIXED) != 0u) {
        return job.fixed[branch];
    }
    if ((job.flags & SOFT) != 0u) {
        return select(1.0 / f32(job.branches), shares[first + branch] / sum, sum > 0.0);
    }
    return select(0.0, 1.0, branch == best);
}

fn weigh(job: Job, first_token: u32, t: u32) {
    let end = min(first_token + TOKENS, job.tokens) * job.rank;
    for (var e = first_token * job.rank + t; e < end; e += THREADS) {
        let token = e / job.rank;
        let k = e % job.rank;
        var branch = 0u;
        while (k >= job.starts[branch + 1u]) {
            branch++;
        }
        let weight = shares[(token - first_token) * MAX_BRANCHES + branch];
        let factor = job.factors[branch] * controls.strengths[job.adapters[branch]];
        z[e] = select(z[e] * (weight * factor), 0.0, weight == 0.0);
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) work: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let job = jobs[0];
    let first_token = work.x * TOKENS;
    // Each thread has one branch of one token.
    let slot = t / MAX_BRANCHES;
    let branch = t % MAX_BRANCHES;
    let token = first_token + slot;
    let place = token * job.branches + branch;
    let inside = slot < TOKENS && token < job.tokens && branch < job.branches;
    if (t < MAX_BRANCHES) {
        atomicStore(&wins[t], 0u);
    }
    if (inside) {
        if ((job.flags & FINISH) != 0u) {
            scores[place] = finish(job, branch, token);
        }
        shares[t] = decisive(job, branch, token);
    }
    workgroupBarrier();
    var weight = 0.0;
    if (inside) {
        weight = weight_of(job, slot * MAX_BRANCHES, branch);
        weights[place] = weight;
    }
    workgroupBarrier();
    if (inside) {
        shares[t] = weight;
    }
    if (t < job.branches) {
        atomicAdd(&log_words[t], atomicLoad(&wins[t]));
    }
    workgroupBarrier();
    weigh(job, first_token, t);
}
