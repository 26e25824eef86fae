// A score from the parts of stats. The kernel declares stats.

#import branch/shared/job
#import shared/exp_log
#import branch/shared/state

fn part_of(job: Job, part: u32, branch: u32, token: u32) -> State {
    let place = ((part * job.branches + branch) * job.tokens + token) * STATE;
    let v = stats[place];
    return State(v.x, v.y, v.z, v.w, stats[place + 1u].x);
}

// 1 - cos(f0, f0 + u) without cancellation, from a = f0², b = f0·u, q = u².
fn one_minus_cosine(a: f32, b: f32, q: f32) -> f32 {
    let f = max(a + 2.0 * b + q, 0.0);
    if (a == 0.0 || f == 0.0) {
        return select(1.0, 0.0, q == 0.0);
    }
    let norms = sqrt(a) * sqrt(f);
    let dot = a + b;
    if (dot < 0.0) {
        return 1.0 - dot / norms;
    }
    // (|f0||f|)² - (f0·f)² = a·q - b²
    let ratio = b / sqrt(a);
    return max(q - ratio * ratio, 0.0) * (a / norms) / (norms + dot);
}

fn finish(job: Job, branch: u32, token: u32) -> f32 {
    var x = part_of(job, 0u, branch, token);
    for (var part = 1u; part < job.parts; part++) {
        let y = part_of(job, part, branch, token);
        if (job.score == KL) {
            x = merge_states(x, y);
        } else {
            x = State(x.m + y.m, x.w + y.w, x.c + y.c, 0.0, 0.0);
        }
    }
    if (job.score == KL) {
        return divergence(x);
    }
    if (job.score == DOT) {
        return one_minus_cosine(x.m, x.w, x.c);
    }
    return x.c;
}
