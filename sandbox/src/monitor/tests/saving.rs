//! Checkpoints that aren't made, and what goes on held from one.

use super::*;

/// Asks for a checkpoint, and has the agent asked to have its processes stand still.
fn saving(bench: &mut Bench) -> UnixStream {
    let ground = serde_json::json!({"epoch": 1, "host": "a kernel", "processor": 7});
    let line = control::request_line(Request::Checkpoint { ground }).unwrap();
    let (socket, file) = (bench.control(), tempfile::tempfile().unwrap());
    control::send_with_fds(&socket, &line, &[file.as_fd()]).unwrap();
    let question = asked(&mut bench.questions);
    assert_eq!(question, hull_proto::Request::StandStill);
    socket
}

/// Its first process ends, and its disk is put away.
fn ends_well(mut bench: Bench) {
    bench.exit(0);
    assert_eq!(asked(&mut bench.questions), hull_proto::Request::PutAway);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

/// One that goes on held, and whoever has let it go, which its agent is asked to do.
fn released() -> (Bench, UnixStream) {
    let mut plan = plan(|_| {});
    (plan.held, plan.guest_id) = (true, Some("before".to_owned()));
    let mut bench = bench_of(plan, Duration::from_secs(60));
    let client = bench.control();
    control::ask(&client, Request::Release).unwrap();
    assert_eq!(asked(&mut bench.questions), hull_proto::Request::GoOn);
    (bench, client)
}

#[test]
fn a_container_that_is_not_saved_goes_on() {
    let image = crate::request::Image {
        reference: "image".to_owned(),
        id: String::new(),
        config: oci_spec::image::ImageConfiguration::default(),
        layers: Vec::new(),
    };
    let mut bench = bench(|request| request.root = Root::Image(image));
    let goes_on = hull_proto::Request::GoOn;
    let refusal = |socket: &UnixStream| control::answer(socket).unwrap_err().to_string();
    // This guest's machine is none.
    let client = saving(&mut bench);
    for request in [Request::Pause, Request::Stats, Request::Exec] {
        let other = bench.control();
        control::ask(&other, request).unwrap();
        assert!(refusal(&other).contains("checkpoint"));
    }
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    let why = refusal(&client);
    assert!(why.contains("can't be saved"), "{why}");
    assert_eq!(asked(&mut bench.questions), goes_on);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    // Processes that don't stand still, and a client that leaves meanwhile.
    let client = saving(&mut bench);
    let message = "stuck".to_owned();
    answer(&mut bench.questions, &hull_proto::Reply::Error { message });
    assert!(refusal(&client).contains("stuck"));
    assert_eq!(asked(&mut bench.questions), goes_on);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    drop(saving(&mut bench));
    assert_eq!(asked(&mut bench.questions), goes_on);
    for _ in 0..2 {
        answer(&mut bench.questions, &hull_proto::Reply::Ok);
    }
    // Without a file there is nothing to save it to.
    let ground = serde_json::json!({"epoch": 1, "host": "", "processor": 7});
    let client = bench.control();
    control::ask(&client, Request::Checkpoint { ground }).unwrap();
    assert!(refusal(&client).contains("no file"));
    ends_well(bench);
}

#[test]
fn a_paused_container_is_paused_again_and_its_processes_go_on_at_its_end() {
    let image = crate::request::Image::default();
    let mut bench = bench(|request| request.root = Root::Image(image));
    let stands = Arc::clone(&bench.stands);
    let stands = || stands.load(Ordering::SeqCst);
    assert_eq!(bench.ask(Request::Pause), Reply::Ok);
    assert!(stands());
    for reply in [
        hull_proto::Reply::Ok,
        hull_proto::Reply::Error {
            message: "stuck".to_owned(),
        },
    ] {
        let client = saving(&mut bench);
        assert!(!stands(), "its agent is to answer");
        answer(&mut bench.questions, &reply);
        // This guest's machine is none.
        assert!(control::answer(&client).is_err());
        // Served after that.
        assert_eq!(bench.ask(Request::Ping), Reply::Ok);
        assert!(stands());
    }
    drop(saving(&mut bench));
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(bench.ask(Request::Resume), Reply::Ok);
    assert!(!stands());
    assert_eq!(asked(&mut bench.questions), hull_proto::Request::GoOn);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    ends_well(bench);
}

#[test]
fn what_goes_on_held_is_let_go_by_its_agent() {
    for ends_first in [false, true] {
        let (mut bench, client) = released();
        if ends_first {
            bench.exit(4);
        } else {
            answer(&mut bench.questions, &hull_proto::Reply::Ok);
        }
        assert_eq!(control::answer(&client).unwrap(), Reply::Ok);
        if !ends_first {
            bench.exit(4);
        }
        assert_eq!(bench.driver.join().unwrap().0.code, 4);
    }
    let (mut bench, client) = released();
    let message = "frozen".to_owned();
    answer(&mut bench.questions, &hull_proto::Reply::Error { message });
    let why = control::answer(&client).unwrap_err().to_string();
    assert!(why.contains("frozen"), "{why}");
    bench.driver.join().unwrap();
}
