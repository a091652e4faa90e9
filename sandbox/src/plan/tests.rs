//! Plans beside this file, word by word (`UPDATE_GOLDEN=1` writes them anew), and single rules.

use std::fs;

use oci_spec::image::{ConfigBuilder, ImageConfiguration, ImageConfigurationBuilder};
use serde_json::Value;

use super::*;
use crate::request::{Image, Tmpfs, Ulimit, Volume, VolumeSource};
use crate::settings::{Assets, Defaults, Registries};

pub(super) fn settings() -> Settings {
    Settings {
        state_dir: "/var/lib/hull".into(),
        run_dir: "/run/hull".into(),
        assets: Assets {
            monitor: "/usr/lib/hull/hull-monitor".into(),
            kernel: "/usr/lib/hull/vmlinux".into(),
            kernel_debug: "/usr/lib/hull/vmlinux-debug".into(),
            initrd: "/usr/lib/hull/initrd".into(),
        },
        defaults: Defaults::default(),
        registries: Registries::default(),
        kvm: "/dev/kvm".into(),
        allow_emulated_kvm: false,
        templates: true,
    }
}

/// A VM of no special kind.
pub(super) fn vm() -> PlannedVm {
    let request = RunRequest::new(Root::Directory("/".into()));
    machine(&request, &settings(), &facts()).unwrap()
}

fn facts() -> HostFacts {
    HostFacts {
        cpus: 4,
        memory_bytes: 8 << 30,
        files: vec!["/host/file".into()],
        pod: None,
    }
}

fn identity() -> Identity {
    Identity {
        id: "0123456789abcdef".repeat(4),
        name: "calm_keel".to_owned(),
        created_at: Timestamp::UNIX_EPOCH,
    }
}

fn image() -> Image {
    let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let config = ConfigBuilder::default()
        .entrypoint(own(&["/entry"]))
        .cmd(own(&["serve", "--all"]))
        .env(own(&["PATH=/app:/bin", "LEVEL=1", "GONE=x"]))
        .user("app:app")
        .working_dir("/srv/app/")
        .volumes(own(&["/data", "/cache"]))
        .stop_signal("SIGRTMIN+3")
        .build()
        .unwrap();
    let config: ImageConfiguration = ImageConfigurationBuilder::default()
        .config(config)
        .build()
        .unwrap();
    Image {
        reference: "docker.io/library/app:1".to_owned(),
        id: "sha256:00".to_owned(),
        config,
        layers: vec!["/layers/base".into(), "/layers/top".into()],
    }
}

/// Some plan.
pub(super) fn sample() -> Plan {
    plan(&full(), identity(), &settings(), &facts()).unwrap()
}

fn full() -> RunRequest {
    let volume = |source: VolumeSource, target: &str, read_only| Volume {
        source,
        target: target.to_owned(),
        read_only,
    };
    let mut request = RunRequest::new(Root::Image(image()));
    request.command = vec!["run".to_owned()];
    request.env = vec![
        ("LEVEL".to_owned(), Some("2".to_owned())),
        ("GONE".to_owned(), None),
        ("NEW".to_owned(), Some("a=b".to_owned())),
    ];
    request.hostname = Some("box".to_owned());
    (request.tty, request.interactive) = (true, true);
    request.terminal_size = Some((24, 80));
    request.volumes = vec![
        volume(
            VolumeSource::Host("/host/dir".into()),
            "/data/deep/er",
            false,
        ),
        volume(VolumeSource::Host("/host/file".into()), "/etc/hosts", true),
        volume(VolumeSource::Host("/host/other".into()), "/data", true),
    ];
    request.tmpfs = vec![Tmpfs {
        target: "/tmp".to_owned(),
        options: vec!["exec".to_owned(), "size=64m".to_owned()],
    }];
    request.read_only = true;
    request.cpus = Some(1.5);
    request.memory_bytes = Some(300_000_000);
    request.pids_limit = Some(100);
    request.cap_add = vec!["NET_ADMIN".to_owned()];
    request.cap_drop = vec!["cap_mknod".to_owned()];
    request.ulimits = vec![Ulimit {
        name: "core".to_owned(),
        soft: 0,
        hard: u64::MAX,
    }];
    request.init = true;
    request.stop_timeout_s = Some(3);
    request.auto_remove = true;
    request
}

/// As JSON, sets in order.
fn shown(plan: &Plan) -> Value {
    let mut value = serde_json::to_value(plan).unwrap();
    let sets = &mut value["spec"]["process"]["capabilities"];
    for set in sets.as_object_mut().unwrap().values_mut() {
        let names = set.as_array_mut().unwrap();
        names.sort_by_key(|name| name.as_str().unwrap().to_owned());
    }
    value
}

fn check(name: &str, request: &RunRequest) {
    let plan = plan(request, identity(), &settings(), &facts()).unwrap();
    let seen = format!("{:#}\n", shown(&plan));
    let back: Plan = serde_json::from_str(&seen).unwrap();
    assert_eq!(shown(&back), shown(&plan), "a plan survives its JSON");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/plan/golden/{name}.json"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &seen).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    assert_eq!(seen, expected, "see src/plan/golden/{name}.json");
}

#[test]
fn an_image_alone() {
    check("image", &RunRequest::new(Root::Image(image())));
}

#[test]
fn everything_asked_for() {
    check("full", &full());
}

#[test]
fn a_directory_with_a_command() {
    let mut request = RunRequest::new(Root::Directory("/rootfs".into()));
    request.command = vec!["/bin/true".to_owned()];
    check("directory", &request);
}

fn refused(change: impl FnOnce(&mut RunRequest)) -> PlanError {
    let mut request = full();
    change(&mut request);
    plan(&request, identity(), &settings(), &facts()).unwrap_err()
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let texts = [
        refused(|r| r.working_dir = Some("srv".to_owned())),
        refused(|r| r.hostname = Some("a b".to_owned())),
        refused(|r| r.env.push((String::new(), None))),
        refused(|r| r.tmpfs[0].target = "/".to_owned()),
        refused(|r| r.tmpfs[0].target = "/data/".to_owned()),
        refused(|r| r.tmpfs.push(r.tmpfs[0].clone())),
        refused(|r| r.volumes[0].target = "/data/../data".to_owned()),
        refused(|r| r.volumes[0].source = VolumeSource::Host("dir".into())),
        refused(|r| r.cap_add.push("FLY".to_owned())),
        refused(|r| r.ulimits[0].name = "wings".to_owned()),
        refused(|r| r.cpus = Some(5.0)),
        refused(|r| r.memory_bytes = Some(1 << 20)),
        refused(|r| r.stop_signal = Some("SIGNOTHING".to_owned())),
        refused(|r| r.groups.push("wheel".to_owned())),
        refused(|r| r.entrypoint = Some(vec![String::new()])),
    ]
    .map(|error| error.to_string());
    let expected = [
        "the working directory 'srv' is invalid, it needs to be an absolute path",
        "invalid hostname 'a b': 1 to 63 of [a-zA-Z0-9.-] are allowed",
        "invalid environment variable: \"\"",
        "invalid mount target '/': it can't be '/'",
        "duplicate mount point: /data",
        "duplicate mount point: /tmp",
        "duplicate mount point: /data",
        "volume source \"dir\" is not an absolute path",
        "invalid capability: \"FLY\"",
        "invalid ulimit 'wings': no such limit",
        "range of CPUs is from 0.01 to 4.00, as there are only 4 CPUs available: 5 asked for",
        "memory of 1 MiB asked for: a VM can have 64 to 8192 MiB on this host",
        "cannot use the stop signal",
        "additional group 'wheel' is not a number",
        "no command specified",
    ];
    assert_eq!(texts, expected);
}

#[test]
fn an_entrypoint_drops_the_images_command() {
    let command = |entrypoint: Option<&[&str]>, command: &[&str]| {
        let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut request = RunRequest::new(Root::Image(image()));
        request.entrypoint = entrypoint.map(own);
        request.command = own(command);
        plan(&request, identity(), &settings(), &facts())
            .map(|plan| plan.command().join(" "))
            .ok()
    };
    assert_eq!(command(None, &[]).unwrap(), "/entry serve --all");
    assert_eq!(command(None, &["x"]).unwrap(), "/entry x");
    assert_eq!(command(Some(&["/e"]), &[]).unwrap(), "/e");
    assert_eq!(command(Some(&["/e"]), &["x"]).unwrap(), "/e x");
    assert_eq!(command(Some(&[]), &["x"]).unwrap(), "x");
    assert_eq!(command(Some(&[]), &[]), None);
}

#[test]
fn an_exec_starts_from_the_containers_process() {
    let plan = plan(&full(), identity(), &settings(), &facts()).unwrap();
    let request = ExecRequest {
        command: vec!["id".to_owned()],
        env: vec![
            ("LEVEL".to_owned(), None),
            ("MORE".to_owned(), Some("1".to_owned())),
        ],
        user: Some("7".to_owned()),
        ..ExecRequest::default()
    };
    let process = exec(&request, &plan).unwrap();
    let env = process.env().clone().unwrap();
    assert!(env.contains(&"MORE=1".to_owned()) && env.contains(&"NEW=a=b".to_owned()));
    assert!(!env.iter().any(|variable| variable.starts_with("LEVEL=")));
    assert_eq!(process.user().uid(), 7);
    assert_eq!(process.terminal(), Some(false));
    assert_eq!(process.cwd(), Path::new("/srv/app"));
}
