//! Every shader permutation is parsed, validated and written out for every API, with no device, and compared with what its
//! launcher takes for granted.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use loraweld::compute::shaders::{Kernel, Struct, declared, files, params};
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

/// Bytes of workgroup memory.
fn workgroup_memory(module: &naga::Module) -> u32 {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).expect("valid module");
    let of_workgroups =
        module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    of_workgroups.map(|(_, variable)| layouter[variable.ty].size).sum()
}

/// Launchers choose tiles of the kernels for matrix units by what they reckon these take.
#[test]
fn kernels_for_matrix_units_fit_the_memory_that_they_are_chosen_for() {
    for kernel in all().filter(uses_matrix_units) {
        let label = kernel.label();
        let most = if label.contains("multiply_software") { 32 << 10 } else { 48 << 10 };
        let workgroup = workgroup_memory(&parsed(&kernel));
        assert!(workgroup <= most, "{label}: {workgroup} bytes of workgroup memory");
    }
}

/// WebGPU's default limits: a laptop's browser-class driver has no more.
#[test]
fn every_permutation_fits_the_default_limits() {
    for kernel in all().filter(|kernel| !uses_matrix_units(kernel)) {
        let label = kernel.label();
        let module = parsed(&kernel);
        let workgroup = workgroup_memory(&module);
        let is_storage =
            |variable: &naga::GlobalVariable| matches!(variable.space, naga::AddressSpace::Storage { .. });
        let storage = module.global_variables.iter().filter(|(_, variable)| is_storage(variable)).count();
        assert!(workgroup <= 16384, "{label}: {workgroup} bytes of workgroup memory");
        assert!(storage <= 8, "{label}: {storage} storage buffers");
        for entry in &module.entry_points {
            let invocations: u32 = entry.workgroup_size.iter().product();
            assert!(invocations <= 256, "{label}: {invocations} invocations");
        }
    }
}

/// Fields and span of the struct that a buffer holds, or holds an array of; nothing of one that holds numbers.
fn layout(module: &naga::Module, buffer: &naga::GlobalVariable) -> Option<(Vec<(String, usize)>, usize)> {
    let ty = match module.types[buffer.ty].inner {
        naga::TypeInner::Array { base, .. } => base,
        _ => buffer.ty,
    };
    let naga::TypeInner::Struct { members, span } = &module.types[ty].inner else { return None };
    let field =
        |member: &naga::StructMember| (member.name.clone().unwrap_or_default(), member.offset as usize);
    Some((members.iter().map(field).collect(), *span as usize))
}

/// A kernel whose file no operation declares is one that nothing here looks at. (That what is declared is what is launched,
/// the launch itself asserts in debug builds.)
#[test]
fn every_kernel_is_declared_once() {
    let mut declared: Vec<_> = all().collect();
    let of_files: BTreeSet<_> = declared.iter().map(Kernel::file).collect();
    assert_eq!(of_files, files().collect());
    let count = declared.len();
    declared.sort_unstable();
    declared.dedup();
    assert_eq!(declared.len(), count);
}

#[test]
fn launchers_and_shaders_have_the_same_structs() {
    let params = params();
    for declared in declared() {
        for kernel in &declared.kernels {
            let (module, label) = (parsed(kernel), kernel.label());
            let mut found = BTreeMap::new();
            for (_, variable) in module.global_variables.iter().filter(|(_, v)| v.binding.is_some()) {
                let name = variable.name.clone().unwrap_or_default();
                found.extend(layout(&module, variable).map(|layout| (name, layout)));
            }
            // Each of the shader's has one of the launcher's, and the other way round.
            let own = declared.structs.iter().map(|(name, own)| (*name, own));
            let params = found.contains_key("params").then_some(("params", &params));
            let of = |(name, own): (&str, &Struct)| {
                let fields = own.fields.iter().map(|(field, at)| ((*field).to_owned(), *at)).collect();
                (name.to_owned(), (fields, own.bytes))
            };
            assert_eq!(found, own.chain(params).map(of).collect(), "{label}");
        }
    }
}

/// The names of the constants that a source file of this crate declares.
fn constants_of(file: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let name = |line: &str| {
        let (visibility, rest) = line.trim_start().split_once("const ")?;
        (visibility.is_empty() || visibility.starts_with("pub"))
            .then(|| rest.split(':').next().unwrap_or_default().to_owned())
    };
    text.lines().filter_map(name).collect()
}

/// What a launcher and its shader both give a name is declared, and the same.
#[test]
fn launchers_and_shaders_have_the_same_constants() {
    let mut compared = 0;
    for declared in declared() {
        let launchers = constants_of(declared.launcher);
        for kernel in &declared.kernels {
            let (module, label) = (parsed(kernel), kernel.label());
            let value = |constant: &naga::Constant| match module.global_expressions[constant.init] {
                naga::Expression::Literal(naga::Literal::U32(value)) => Some(f64::from(value)),
                naga::Expression::Literal(naga::Literal::F32(value)) => Some(f64::from(value)),
                _ => None,
            };
            let all: BTreeMap<_, _> = module
                .constants
                .iter()
                .map(|(_, c)| (c.name.as_deref().unwrap_or_default(), value(c)))
                .collect();
            for (name, want) in &declared.constants {
                let got = all.get(name).unwrap_or_else(|| panic!("{label} has no constant `{name}`"));
                assert_eq!(*got, Some(*want), "`{name}` of {label}");
                compared += 1;
            }
            for name in all.keys().filter(|name| launchers.contains(**name)) {
                let known = declared.constants.iter().map(|(name, _)| *name).chain(kernel.permutation());
                assert!(
                    known.into_iter().any(|known| known == *name),
                    "`{name}` of {label} is a constant of {} as well, which does not declare it",
                    declared.launcher
                );
            }
        }
    }
    assert!(compared > 1000, "only {compared} constants");
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
