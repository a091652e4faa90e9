//! The words of host and guest: frames, control lines, specs.

use hull_proto::{
    Decoder, Frame, Hello, LineDecoder, MAX_FROM_GUEST, Reply, Request, Spawn, encode,
};
use oci_spec::runtime::{Process, Spec};

/// What an agent sends, in pieces as the first byte says.
pub(crate) fn frames(data: &[u8]) {
    let Some((piece, stream)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::new(MAX_FROM_GUEST);
    for piece in stream.chunks(usize::from(*piece) + 1) {
        decoder.feed(piece);
        loop {
            match decoder.take() {
                Ok(Some(frame)) => again(&frame),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// What was read is written as something that reads the same.
fn again(frame: &Frame) {
    let mut bytes = Vec::new();
    encode(frame, &mut bytes).expect("what was decoded can be encoded");
    // Defaults that were left out are written: it may have grown.
    let mut decoder = Decoder::new(2 * MAX_FROM_GUEST);
    decoder.feed(&bytes);
    let read = decoder.take().expect("what was encoded can be decoded");
    assert_eq!(read.as_ref(), Some(frame));
    assert!(decoder.into_rest().is_empty());
}

/// Lines of the control stream, of either side.
pub(crate) fn control(data: &[u8]) {
    let Some((kind, stream)) = data.split_first() else {
        return;
    };
    let mut decoder = LineDecoder::default();
    for piece in stream.chunks(usize::from(kind / 3) + 1) {
        decoder.feed(piece);
        let more = |decoder: &mut LineDecoder| match kind % 3 {
            0 => decoder.take::<Hello>().map(|line| line.is_some()),
            1 => decoder.take::<Reply>().map(|line| line.is_some()),
            _ => decoder.take::<Request>().map(|line| line.is_some()),
        };
        loop {
            match more(&mut decoder) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return,
            }
        }
    }
}

/// What the agent is told to run.
pub(crate) fn spec(data: &[u8]) {
    let Ok(spawn) = read_spawn(data) else {
        return;
    };
    match spawn {
        Spawn::Container(start) => drop(start.spec.read::<Spec>()),
        Spawn::Exec(start) => drop(start.process.read::<Process>()),
        Spawn::Connect { .. } => {}
    }
}

fn read_spawn(data: &[u8]) -> Result<Spawn, ()> {
    const SPAWN: u8 = 1;
    let mut frame = u32::try_from(data.len())
        .map_err(drop)?
        .to_le_bytes()
        .to_vec();
    frame.push(SPAWN);
    frame.extend_from_slice(data);
    let mut decoder = Decoder::new(hull_proto::MAX_FROM_HOST);
    decoder.feed(&frame);
    match decoder.take() {
        Ok(Some(Frame::Spawn(spawn))) => Ok(spawn),
        _ => Err(()),
    }
}
