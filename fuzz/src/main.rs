//! The engine's entry: libFuzzer calls the target that `HULL_FUZZ` names. See `cargo xtask fuzz`.
#![no_main]

use std::sync::OnceLock;

use hull_fuzz::Target;
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("HULL_FUZZ").unwrap_or_default();
        #[expect(clippy::expect_used, reason = "without a target there is nothing to do")]
        let target = hull_fuzz::target(&name).expect("HULL_FUZZ names no target");
        hull_fuzz::bound_files();
        TARGET.get_or_init(|| target);
    },
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            target(data);
        }
    }
);
