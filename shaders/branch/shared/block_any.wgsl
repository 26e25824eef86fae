// What branch/shared/block_held.wgsl has apart, by one `multiply` for all.

// The first of two branches, columns `first` .. `end` of B_cat.
fn multiply_first(job: Job, channel: u32, first: u32, end: u32) {
    multiply(job, channel, first, end, 0u);
}

// The second, whose Z is from column `place` on.
fn multiply_second(job: Job, channel: u32, first: u32, end: u32, place: u32) {
    multiply(job, channel, first, end, place);
}

// All columns.
fn multiply_all(job: Job, channel: u32) {
    multiply(job, channel, 0u, job.columns, 0u);
}
