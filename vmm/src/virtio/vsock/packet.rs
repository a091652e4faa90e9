//! The vsock packet header (virtio 1.3 §5.10.6), as bytes and as a struct.
//!
//! Owns the layout and the numbers of the protocol; refuses nothing itself: a
//! header is 44 bytes and every pattern of them decodes. What the fields mean
//! to a connection is `connection.rs`'s, whom they are for is `mux.rs`'s.
//! The header may lie anywhere in a chain, beside its data or apart from it:
//! callers copy it out of the guest once, and look only at the copy.

/// Bytes of a packet header on the wire.
pub(super) const HEADER_BYTES: usize = 44;

/// The context id by which a guest reaches its host (virtio 1.3 §5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// Stream sockets, the only type this device offers (virtio 1.3 §5.10.6).
pub(super) const TYPE_STREAM: u16 = 1;

/// `SHUTDOWN` flag: the sender will receive no more data (virtio 1.3 §5.10.6.5).
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// `SHUTDOWN` flag: the sender will send no more data (virtio 1.3 §5.10.6.5).
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Both flags of a `SHUTDOWN`: the connection is over.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The operations of virtio 1.3 §5.10.6, by their numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Refuses or ends a connection.
    Reset = 3,
    /// Closes one or both directions.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells how much buffer is free.
    CreditUpdate = 6,
    /// Asks for a `CreditUpdate`.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub(super) fn from_wire(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header (virtio 1.3 §5.10.6, `struct virtio_vsock_hdr`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Context id of the sender.
    pub(super) src_cid: u64,
    /// Context id of the receiver.
    pub(super) dst_cid: u64,
    /// Port of the sender.
    pub(super) src_port: u32,
    /// Port of the receiver.
    pub(super) dst_port: u32,
    /// Bytes of data that follow.
    pub(super) len: u32,
    /// Socket type, see [`TYPE_STREAM`].
    pub(super) socket_type: u16,
    /// Operation number, see [`Op`].
    pub(super) op: u16,
    /// Flags of the operation.
    pub(super) flags: u32,
    /// Bytes of the sender's receive buffer.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, wrapping.
    pub(super) fwd_cnt: u32,
}

/// Reads little-endian fields one after the other.
struct Fields<'a>(&'a [u8; HEADER_BYTES], usize);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.0[self.1..self.1 + N]);
        self.1 += N;
        field
    }
}

impl Header {
    /// Decodes a header; every pattern of bytes is one.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes, 0);
        Self {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            socket_type: u16::from_le_bytes(fields.next()),
            op: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    /// Encodes the header as it lies in guest memory.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.socket_type.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_pattern_of_bytes_survives_the_round_trip(bytes in prop::array::uniform32(any::<u8>()), tail in prop::array::uniform12(any::<u8>())) {
            let mut wire = [0; HEADER_BYTES];
            wire[..32].copy_from_slice(&bytes);
            wire[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&wire).encode(), wire);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            op: Op::Data as u16,
            fwd_cnt: 0x0403_0201,
            ..Header::default()
        };
        let wire = header.encode();
        assert_eq!(wire[30], 5);
        assert_eq!(wire[40..], [1, 2, 3, 4]);
    }

    #[test]
    fn operations_keep_their_numbers() {
        for number in 0..=u16::MAX {
            assert_eq!(
                Op::from_wire(number).map_or(0, |op| op as u16),
                if (1..=7).contains(&number) { number } else { 0 }
            );
        }
    }
}
