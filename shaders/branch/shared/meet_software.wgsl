// meet_units.wgsl for any adapter: all threads of a workgroup call it.

#import branch/shared/place_software

fn meet() {
    workgroupBarrier();
}
