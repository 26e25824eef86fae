// place_units.wgsl for any adapter: subgroups are counted by thread, 32 each.

var<private> t: u32;
var<private> subgroup: u32;
var<private> lane: u32;

fn locate(thread: u32, subgroup_id: u32, subgroup_lane: u32) {
    t = thread;
    subgroup = thread / 32u;
    lane = thread % 32u;
}
