//! Calls of the C interface in any order, with any arguments that the header allows. `fuzz/` goes on with it.

#[path = "calls/body.rs"]
mod body;

#[test]
fn calls_in_any_order() {
    // Miri is slow.
    let strings = if cfg!(miri) { 2 } else { 200 };
    let (mut state, mut done) = (1u64, 0);
    for _ in 0..strings {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        let bytes: Vec<u8> = (0..1024).map(|_| next()).collect();
        done += body::calls(&mut arbitrary::Unstructured::new(&bytes)).unwrap_or(0);
    }
    assert!(done > strings, "only {done} calls succeeded");
}
