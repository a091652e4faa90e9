//! Other containers in the guest of a driver's.

use super::*;
use crate::control::JoiningShare;

/// The monitor of another container, which joins and brings a directory.
fn join(bench: &Bench, id: &str) -> UnixStream {
    let socket = bench.control();
    let name = format!("{id}.root");
    let request = Request::Join {
        id: id.to_owned(),
        shares: vec![JoiningShare {
            name,
            read_only: false,
        }],
        memory_bytes: None,
    };
    let line = control::request_line(request);
    let directory = File::open("/").unwrap();
    control::send_with_fds(&socket, &line.unwrap(), &[directory.as_fd()]).unwrap();
    assert_eq!(control::answer(&socket).unwrap(), Reply::Ok);
    socket
}

#[test]
fn a_member_speaks_to_the_agent_of_itself_and_takes_all_of_it_along() {
    let mut bench = bench(|_| {});
    let mut member = join(&bench, "m1");
    assert_eq!(*bench.shown.lock().unwrap(), ["m1.root"]);
    let question = hull_proto::Request::Freeze {
        id: "m1".to_owned(),
        frozen: true,
    };
    let mut line = Vec::new();
    hull_proto::encode_line(&question, &mut line).unwrap();
    member.write_all(&line).unwrap();
    assert_eq!(asked(&mut bench.questions), question);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(
        line_of::<hull_proto::Reply>(&mut member),
        hull_proto::Reply::Ok
    );

    // It leaves: its container is ended before its directories go.
    member.shutdown(std::net::Shutdown::Write).unwrap();
    let remove = |id: &str| hull_proto::Request::Remove { id: id.to_owned() };
    assert_eq!(asked(&mut bench.questions), remove("m1"));
    assert_eq!(*bench.shown.lock().unwrap(), ["m1.root"]);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(member.read(&mut [0; 1]).unwrap(), 0);
    assert!(bench.shown.lock().unwrap().is_empty());

    // One that asks about others is no member any more.
    let mut stranger = join(&bench, "m2");
    stranger.write_all(&line).unwrap();
    assert_eq!(asked(&mut bench.questions), remove("m2"));
    bench.exit(0);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

#[test]
fn a_sandbox_that_others_are_in_is_not_held_still_as_a_whole() {
    let mut bench = bench(|_| {});
    let _member = join(&bench, "m1");
    let pausing = bench.control();
    control::ask(&pausing, Request::Pause).unwrap();
    let frozen = asked(&mut bench.questions);
    assert!(matches!(
        frozen,
        hull_proto::Request::Freeze { frozen: true, .. }
    ));
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(control::answer(&pausing).unwrap(), Reply::Ok);
    let resuming = bench.control();
    control::ask(&resuming, Request::Resume).unwrap();
    let thawed = asked(&mut bench.questions);
    assert!(matches!(
        thawed,
        hull_proto::Request::Freeze { frozen: false, .. }
    ));
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(control::answer(&resuming).unwrap(), Reply::Ok);
    bench.exit(0);
    bench.driver.join().unwrap();
}
