//! Every shader permutation is parsed, validated and written out for every API, with no device, and compared with what its
//! launcher takes for granted.

use loraweld::compute::shaders::{Kernel, declared};
use naga::valid::{Capabilities, ValidationFlags, Validator};

fn all() -> impl Iterator<Item = Kernel> {
    declared().into_iter().flat_map(|declared| declared.kernels)
}

/// Whether it needs matrix units or only serves them, which neither DX12 nor WebGPU's default limits have; each such kernel
/// has a twin that does without.
fn uses_matrix_units(kernel: &Kernel) -> bool {
    kernel.source().starts_with("enable f16;")
}

fn parsed(kernel: &Kernel) -> naga::Module {
    let (label, source) = (kernel.label(), kernel.source());
    naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(&source)))
}

#[test]
fn every_permutation_is_valid_and_portable() {
    for kernel in all() {
        let label = kernel.label();
        let source = kernel.source();
        let module = parsed(&kernel);
        let info = Validator::new(ValidationFlags::all(), Capabilities::all())
            .validate(&module)
            .unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(&source)));

        let spirv = naga::back::spv::write_vec(&module, &info, &Default::default(), None)
            .unwrap_or_else(|e| panic!("{label}: SPIR-V: {e}"));
        assert!(!spirv.is_empty(), "{label}");

        // Matrices of 16 x 16 exist on Vulkan only; Metal's are 8 x 8, DX12 has none.
        if uses_matrix_units(&kernel) {
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
    for kernel in all().filter(|kernel| !uses_matrix_units(kernel)) {
        let label = kernel.label();
        let module = parsed(&kernel);
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

/// Fields and span of the struct that a buffer holds, or holds an array of.
fn layout(module: &naga::Module, buffer: &str) -> (Vec<(String, usize)>, usize) {
    let (_, variable) = module
        .global_variables
        .iter()
        .find(|(_, variable)| variable.name.as_deref() == Some(buffer))
        .unwrap_or_else(|| panic!("there is no buffer `{buffer}`"));
    let ty = match module.types[variable.ty].inner {
        naga::TypeInner::Array { base, .. } => base,
        _ => variable.ty,
    };
    let naga::TypeInner::Struct { members, span } = &module.types[ty].inner else {
        panic!("`{buffer}` holds no struct")
    };
    let field =
        |member: &naga::StructMember| (member.name.clone().unwrap_or_default(), member.offset as usize);
    (members.iter().map(field).collect(), *span as usize)
}

#[test]
fn launchers_and_shaders_have_the_same_structs() {
    for declared in declared() {
        for kernel in &declared.kernels {
            let module = parsed(kernel);
            for (buffer, declared) in &declared.structs {
                let fields: Vec<_> =
                    declared.fields.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect();
                assert_eq!(
                    layout(&module, buffer),
                    (fields, declared.bytes),
                    "{buffer} of {}",
                    kernel.label()
                );
            }
        }
    }
}

#[test]
fn launchers_and_shaders_have_the_same_constants() {
    let mut compared = 0;
    for declared in declared() {
        for kernel in &declared.kernels {
            let module = parsed(kernel);
            for (name, value) in &declared.constants {
                let of_name = |constant: &naga::Constant| constant.name.as_deref() == Some(*name);
                let (_, constant) = module
                    .constants
                    .iter()
                    .find(|(_, constant)| of_name(constant))
                    .unwrap_or_else(|| panic!("{} has no constant `{name}`", kernel.label()));
                let got = match module.global_expressions[constant.init] {
                    naga::Expression::Literal(naga::Literal::U32(got)) => f64::from(got),
                    naga::Expression::Literal(naga::Literal::F32(got)) => f64::from(got),
                    ref other => panic!("`{name}` of {} is {other:?}", kernel.label()),
                };
                assert_eq!(got, *value, "`{name}` of {}", kernel.label());
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "only {compared} constants");
}

/// Where the same piece is imported twice, directly or by others, it comes once.
#[test]
fn pieces_are_imported_once() {
    for kernel in all() {
        let source = kernel.source();
        let mut structs: Vec<_> =
            source.lines().filter(|line| line.starts_with("struct ") || line.starts_with("fn ")).collect();
        let count = structs.len();
        structs.sort_unstable();
        structs.dedup();
        assert_eq!(structs.len(), count, "{}", kernel.label());
        assert!(!source.contains("#import"), "{}", kernel.label());
    }
}
