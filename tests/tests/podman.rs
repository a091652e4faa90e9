//! Debian's podman with Hull as its OCI runtime, in a few whole containers.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use hull_tests::engine::Engine;
use hull_tests::hull::Hull;
use hull_tests::image;
use hull_tests::process::Process;
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_command_runs_with_its_streams_and_its_code() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let script = "cat; echo err >&2; uname -r; exit 7";
    let ran = engine
        .run(&["-i", image::PLAIN, "sh", "-c", script])
        .stdin("in\n")
        .output();
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy();
    assert_eq!((ran.code, ran.errors().as_str()), (7, "err\n"), "{ran:?}");
    let text = ran.text();
    assert!(text.starts_with("in\n") && !text.contains(&*host), "{text}");
    let missing = engine.run(&[image::PLAIN, "no-such-command"]).output();
    assert_eq!(missing.code, 127, "{:?}", missing.all());
    engine.check();
}

#[test]
fn a_container_in_the_background_is_entered_read_and_stopped() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let mut words = vec!["run", "-d", "--network", "none", "--name", "c", "-t"];
    words.extend([image::PLAIN, "sh", "-c", script]);
    engine.podman(&words).output().ok();
    let entered = engine
        .podman(&["exec", "-i", "c", "sh", "-c", "cat; exit 5"])
        .stdin("to exec")
        .output();
    assert_eq!(entered.all(), (5, "to exec".into(), String::new()));
    engine.podman(&["stop", "c"]).output().ok();
    let code = engine.podman(&["inspect", "-f", "{{.State.ExitCode}}", "c"]);
    assert_eq!(code.output().ok().trim(), "3");
    assert_eq!(engine.podman(&["logs", "c"]).output().ok(), "up\r\nbye\r\n");
    engine.podman(&["rm", "c"]).output().ok();
    engine.check();
}

#[test]
fn a_container_is_on_podmans_own_network_and_its_port_is_published() {
    let Some(hull) = Hull::new() else { return };
    Process::new(["modprobe", "tun"]).output().ok();
    let engine = Engine::new(&hull);
    // The host as the container sees it: the gateway.
    let server = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let served = thread::spawn(move || {
        let (mut client, from) = server.accept().unwrap();
        client.write_all(b"from the host\n").unwrap();
        from.ip()
    });
    let script = format!(
        "gate=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); \
         ip -4 -o address show eth0 | sed 's/.*inet \\([^/]*\\).*/own \\1/'; \
         ping -c1 -w20 $gate >/dev/null && nc $gate {port} </dev/null; cat /etc/hosts; \
         mkdir /tmp/w; echo from-the-guest > /tmp/w/f; echo up; exec httpd -f -p 80 -h /tmp/w"
    );
    let mut words = vec![
        "run",
        "-d",
        "--name",
        "n",
        "--hostname",
        "named",
        "-p",
        "8099:80",
    ];
    words.extend([image::PLAIN, "sh", "-c", &script]);
    engine.podman(&words).output().ok();
    let mut logs = engine.podman(&["logs", "-f", "n"]).spawn();
    logs.await_stdout("up\n");
    let inspected = engine.podman(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "n"]);
    let address = inspected.output().ok().trim().to_owned();
    assert_eq!(served.join().unwrap().to_string(), address);
    let bridge = "10.88.0.1:8099";
    let mut page = String::new();
    let mut published = TcpStream::connect(bridge).unwrap();
    published.write_all(b"GET /f HTTP/1.0\r\n\r\n").unwrap();
    published.read_to_string(&mut page).unwrap();
    assert!(page.ends_with("from-the-guest\n"), "{page}");
    engine.podman(&["rm", "-f", "-t", "0", "n"]).output().ok();
    // It follows for ever: the engine has no events to tell it of the end.
    logs.signal(Signal::KILL);
    let said = logs.wait().text();
    let lines = [
        format!("own {address}\nfrom the host\n"),
        format!("{address}\tnamed"),
    ];
    assert!(lines.iter().all(|line| said.contains(line)), "{said}");
    let left = Process::new(["ip", "-br", "link"]).output().ok();
    assert!(!left.contains("veth") && !left.contains("hull"), "{left}");
    engine.check();
}

#[test]
fn a_pod_is_one_virtual_machine() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let create = ["pod", "create", "--name", "p", "--network", "none"];
    let infra = [
        "--infra-image",
        image::PLAIN,
        "--infra-command",
        "sleep 99999",
    ];
    engine.podman(&[&create[..], &infra].concat()).output().ok();
    let run = |words: &[&str]| engine.podman(&[&["run", "--pod", "p"], words].concat());
    let script = "mkdir /w; echo from-a > /w/f; echo a > /dev/shm/a; \
        httpd -p 127.0.0.1:80 -h /w; echo up; exec sleep 99999";
    run(&["-d", "--name", "a", image::PLAIN, "sh", "-c", script])
        .output()
        .ok();
    let mut logs = engine.podman(&["logs", "-f", "a"]).spawn();
    logs.await_stdout("up\n");
    let script = "wget -qO- http://127.0.0.1/f; ls -d /w; cat /dev/shm/a; \
        cat /proc/sys/kernel/random/boot_id; hostname; exit 4";
    let b = run(&["--rm", "--name", "b", image::PLAIN, "sh", "-c", script]).output();
    let whoami = "cat /proc/sys/kernel/random/boot_id; hostname";
    let a = engine
        .podman(&["exec", "a", "sh", "-c", whoami])
        .output()
        .ok();
    assert_eq!(
        (b.code, b.text()),
        (4, format!("from-a\na\n{a}")),
        "{}",
        b.errors()
    );
    assert!(b.errors().contains("/w: No such file"), "{}", b.errors());
    // One that is killed takes nobody along.
    engine.podman(&["kill", "a"]).output().ok();
    let c = run(&["--rm", image::PLAIN, "sh", "-c", "hostname"])
        .output()
        .ok();
    assert!(a.ends_with(&c), "{a}, {c}");
    engine
        .podman(&["pod", "rm", "-f", "-t", "0", "p"])
        .output()
        .ok();
    engine.check();
}

#[test]
fn a_pod_of_kubernetes_is_played() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let shared = hull.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let container = |name: &str, script: &str| {
        json!({
            "name": name,
            "image": image::PLAIN,
            "imagePullPolicy": "Never",
            "command": ["sh", "-c", script],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        })
    };
    let serve = "mkdir /w; echo served > /w/f; exec httpd -f -p 127.0.0.1:80 -h /w";
    let fetch = "until wget -qO /data/fetched http://127.0.0.1/f; do sleep 0.2; done; \
        hostname > /data/name; sleep 99999";
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "played"},
        "spec": {
            "restartPolicy": "Never",
            "containers": [container("serve", serve), container("fetch", fetch)],
            "volumes": [{"name": "data", "hostPath": {"path": shared, "type": "Directory"}}],
        },
    });
    let file = hull.path().join("pod.yaml");
    fs::write(&file, pod.to_string()).unwrap();
    let file = file.to_str().unwrap();
    engine
        .podman(&["play", "kube", "--network", "none", file])
        .output()
        .ok();
    let script = "until [ -s /data/name ]; do sleep 0.2; done; cat /data/fetched /data/name";
    let seen = engine
        .podman(&["exec", "played-serve", "sh", "-c", script])
        .output();
    assert_eq!(seen.ok(), "served\nplayed\n");
    let states = ["ps", "--filter", "status=running", "--format", "{{.Names}}"];
    let running = engine.podman(&states).output().ok();
    assert!(
        running.contains("played-fetch") && running.contains("played-serve"),
        "{running}"
    );
    engine
        .podman(&["play", "kube", "--down", file])
        .output()
        .ok();
    let left = engine.podman(&["ps", "-a", "-q"]).output().ok();
    assert_eq!(left, "");
    engine.check();
}

#[test]
fn files_are_copied_and_health_is_checked() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let volume = hull.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("v"), "in the volume\n").unwrap();
    let volume = format!("{}:/a/volume", volume.display());
    let check = "test -e /hull-healthy || { echo ill; exit 1; }";
    let mut words = vec![
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        "c",
        "-v",
        &volume,
    ];
    words.extend(["--health-cmd", check, "--health-interval", "disable"]);
    words.extend([image::PLAIN, "sleep", "99999"]);
    engine.podman(&words).output().ok();
    let ill = engine.podman(&["healthcheck", "run", "c"]).output();
    assert_eq!(ill.code, 1, "{:?}", ill.all());
    let (from, to) = (hull.path().join("from"), hull.path().join("to"));
    fs::write(&from, "copied in\n").unwrap();
    let from = from.to_str().unwrap();
    engine
        .podman(&["cp", from, "c:/hull-healthy"])
        .output()
        .ok();
    assert!(!Path::new("/hull-healthy").exists(), "into the host");
    engine.podman(&["healthcheck", "run", "c"]).output().ok();
    let seen = engine.podman(&[
        "exec",
        "c",
        "sh",
        "-c",
        "cat /hull-healthy; echo out > /made",
    ]);
    assert_eq!(seen.output().ok(), "copied in\n");
    engine
        .podman(&["cp", "c:/made", to.to_str().unwrap()])
        .output()
        .ok();
    assert_eq!(fs::read_to_string(&to).unwrap(), "out\n");

    // What an engine meets that goes by the process.
    let pid = engine
        .podman(&["inspect", "-f", "{{.State.Pid}}", "c"])
        .output()
        .ok();
    let seen = Path::new("/proc").join(pid.trim()).join("root");
    assert_eq!(
        fs::read_to_string(seen.join("a/volume/v")).unwrap(),
        "in the volume\n"
    );
    assert!(seen.join("made").exists() && !seen.join("usr/lib/podman").exists());
    engine.podman(&["rm", "-f", "-t", "0", "c"]).output().ok();
    engine.check();
}
