//! `hull doctor` on a host that can run containers.

use std::ffi::CString;
use std::fs;

use hull_tests::hull::Hull;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;

#[test]
fn a_good_host_is_said_to_be_one() {
    let Some(hull) = Hull::new() else { return };
    let said = hull.cmd(["doctor"]).output();
    assert_eq!(said.code, 0, "{:?}", said.all());
    let report: Value =
        serde_json::from_str(&hull.cmd(["doctor", "--json"]).output().ok()).unwrap();
    assert_eq!(report["ready"], true);
    let findings = report["findings"].as_array().unwrap();
    assert!(!findings.is_empty());
    for finding in findings {
        assert_ne!(finding["health"], "broken", "{finding}");
    }
}

#[test]
fn a_state_directory_that_cannot_hold_layers_is_said_to_be_one() {
    let Some(hull) = Hull::new() else { return };
    hull.image();
    let state = hull.state_dir();
    let [upper, work] = ["upper", "work"].map(|name| hull.path().join(name));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        state.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options).unwrap();
    mount(
        "state",
        &state,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    let doctor = hull.cmd(["doctor"]).output();
    unmount(&state, UnmountFlags::empty()).unwrap();
    let says = |text: &str| text.contains("lies on overlay") && text.contains("state_dir");
    assert!(doctor.code != 0 && says(&doctor.text()), "{doctor:?}");
}
