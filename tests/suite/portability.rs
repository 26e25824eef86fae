//! Every shader permutation is parsed, validated and written out for every API, with no device.

use loraweld::compute::shaders::Kernel;
use naga::valid::{Capabilities, ValidationFlags, Validator};

#[test]
fn every_permutation_is_valid_and_portable() {
    for kernel in Kernel::all() {
        let label = kernel.label();
        let source = kernel.source();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(&source)));
        let info = Validator::new(ValidationFlags::all(), Capabilities::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(&source)));

        let spirv = naga::back::spv::write_vec(&module, &info, &Default::default(), None)
            .unwrap_or_else(|e| panic!("{label}: SPIR-V: {e}"));
        assert!(!spirv.is_empty(), "{label}");

        // Matrices of 16 x 16 exist on Vulkan only; Metal's are 8 x 8, DX12 has none.
        if kernel.uses_matrix_units() {
            continue;
        }
        // f64 exists on Vulkan and DX12 only; such kernels have a double-single twin for Metal.
        if !label.contains("f64") {
            let options = naga::back::msl::Options { fake_missing_bindings: true, ..Default::default() };
            let (msl, _) = naga::back::msl::write_string(&module, &info, &options, &Default::default())
                .unwrap_or_else(|e| panic!("{label}: MSL: {e}"));
            assert!(msl.contains("kernel void"), "{label}");
        }

        let options = naga::back::hlsl::Options { fake_missing_bindings: true, ..Default::default() };
        let mut hlsl = String::new();
        naga::back::hlsl::Writer::new(&mut hlsl, &options, &Default::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{label}: HLSL: {e}"));
        assert!(hlsl.contains("numthreads"), "{label}");
    }
}

/// WebGPU's default limits: a laptop's browser-class driver has no more.
#[test]
fn every_permutation_fits_the_default_limits() {
    for kernel in Kernel::all().into_iter().filter(|kernel| !kernel.uses_matrix_units()) {
        let label = kernel.label();
        let module = naga::front::wgsl::parse_str(&kernel.source()).expect("checked above");
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).expect("valid module");
        let (mut workgroup, mut storage) = (0, 0);
        for (_, variable) in module.global_variables.iter() {
            match variable.space {
                naga::AddressSpace::WorkGroup => workgroup += layouter[variable.ty].size,
                naga::AddressSpace::Storage { .. } => storage += 1,
                _ => {}
            }
        }
        assert!(workgroup <= 16384, "{label}: {workgroup} bytes of workgroup memory");
        assert!(storage <= 8, "{label}: {storage} storage buffers");
        for entry in &module.entry_points {
            let invocations: u32 = entry.workgroup_size.iter().product();
            assert!(invocations <= 256, "{label}: {invocations} invocations");
        }
    }
}
