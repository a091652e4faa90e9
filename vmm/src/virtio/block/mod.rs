//! The disk (virtio 1.3 §5.2): a file, at a fixed size.
//!
//! Requests are done one after the other on the worker's thread, straight
//! between the file and guest RAM. A request beyond the disk's end, or a write
//! to a read-only one, is answered with an error, never begun.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

use super::device::{
    Activation, DeviceError, Persist, RestoreError, Unsaveable, VirtioDevice, read_config_bytes,
};
use super::queue::{Chain, Queue, QueueError};
use crate::spec::{BlockSpec, MAX_BLOCK_SERIAL_BYTES};

/// The unit of all that the protocol counts.
const SECTOR_BYTES: u64 = 512;
/// What guests are told to read and write at least, as the host's file systems do.
const BLOCK_BYTES: u32 = 4096;
/// Type, a reserved word, the sector.
const HEADER_BYTES: usize = 16;
/// Segments of one request: what a chain of 256 descriptors leaves beside header and status.
const MAX_SEGMENTS: u32 = 254;
/// The most sectors of one discard or zeroing segment: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const REQUEST_IN: u32 = 0;
const REQUEST_OUT: u32 = 1;
const REQUEST_FLUSH: u32 = 4;
const REQUEST_GET_ID: u32 = 8;
const REQUEST_DISCARD: u32 = 11;
const REQUEST_WRITE_ZEROES: u32 = 13;

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// How a request failed, beside a broken chain.
enum Failure {
    /// The guest gets this status.
    Status(u8),
    /// The chain is broken: the device stops.
    Guest(DeviceError),
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        Self::Guest(error.into())
    }
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Status(STATUS_ERROR)
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    file: File,
    read_only: bool,
    durable: bool,
    serial: [u8; MAX_BLOCK_SERIAL_BYTES],
    sectors: u64,
    /// Written since the last flush: what a guest may not lose when it never asks again.
    dirty: bool,
}

/// A disk's state: its content is the file's.
#[derive(Debug, Serialize, Deserialize)]
pub struct BlockState {
    sectors: u64,
    read_only: bool,
    #[serde(default)]
    dirty: bool,
}

impl Block {
    /// A disk of what `file` holds now, cut to whole sectors.
    ///
    /// # Errors
    /// When the file's size can't be had.
    pub fn new(mut file: File, spec: &BlockSpec) -> io::Result<Self> {
        // A block device's size isn't in its metadata.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_BYTES;
        let mut bytes = [0; MAX_BLOCK_SERIAL_BYTES];
        for (to, from) in bytes.iter_mut().zip(spec.serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            file,
            read_only: spec.read_only,
            durable: spec.durable,
            serial: bytes,
            sectors,
            dirty: false,
        })
    }

    /// Whether the disk is whole blocks.
    fn has_large_blocks(&self) -> bool {
        self.sectors
            .is_multiple_of(u64::from(BLOCK_BYTES) / SECTOR_BYTES)
    }

    /// The configuration space up to the write-zeroes fields (virtio 1.3 §5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &self.sectors.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &BLOCK_BYTES.to_le_bytes());
        // discard: sectors, segments, alignment in sectors.
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        // write zeroes: sectors, segments, may unmap.
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// Does one request and puts its status into the chain's last byte; returns how many
    /// bytes of the chain are filled.
    fn serve(&mut self, chain: &Chain) -> Result<u32, DeviceError> {
        let header = chain.read_array::<HEADER_BYTES>(0)?;
        let data_len = chain
            .writable_len()
            .checked_sub(1)
            .ok_or_else(|| DeviceError::Guest("block request without room for a status".into()))?;
        let (status, filled) = match self.request(&header, chain, data_len) {
            Ok(filled) => (STATUS_OK, filled),
            Err(Failure::Status(status)) => (status, 0),
            Err(Failure::Guest(error)) => return Err(error),
        };
        chain.write_at(data_len as usize, &[status])?;
        // The status counts as written only when all before it is.
        Ok(if filled == data_len {
            data_len + 1
        } else {
            filled
        })
    }

    fn request(
        &mut self,
        header: &[u8; HEADER_BYTES],
        chain: &Chain,
        data_len: u32,
    ) -> Result<u32, Failure> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        let writes = chain.readable_len() - HEADER_BYTES as u32;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            REQUEST_IN => {
                self.check(sector, u64::from(data_len))?;
                self.transfer(sector, chain, data_len, false)?;
                Ok(data_len)
            }
            REQUEST_OUT => {
                self.check_writable()?;
                self.check(sector, u64::from(writes))?;
                self.transfer(sector, chain, writes, true)?;
                Ok(0)
            }
            REQUEST_FLUSH => {
                if self.dirty && self.durable {
                    self.file.sync_data()?;
                }
                self.dirty = false;
                Ok(0)
            }
            REQUEST_GET_ID => {
                let length = self.serial.len().min(data_len as usize);
                chain.write_at(0, self.serial.get(..length).unwrap_or_default())?;
                Ok(u32::try_from(length).unwrap_or(0))
            }
            kind @ (REQUEST_DISCARD | REQUEST_WRITE_ZEROES) => {
                self.check_writable()?;
                if writes != 16 {
                    return Err(Failure::Status(STATUS_UNSUPPORTED));
                }
                self.punch(kind, &chain.read_array(HEADER_BYTES)?)?;
                Ok(0)
            }
            _ => Err(Failure::Status(STATUS_UNSUPPORTED)),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.read_only {
            Err(Failure::Status(STATUS_ERROR))
        } else {
            Ok(())
        }
    }

    /// Whether `bytes` from `sector` on are whole sectors of the disk.
    fn check(&self, sector: u64, bytes: u64) -> Result<(), Failure> {
        let inside = bytes.is_multiple_of(SECTOR_BYTES)
            && sector
                .checked_add(bytes / SECTOR_BYTES)
                .is_some_and(|end| end <= self.sectors);
        if inside {
            Ok(())
        } else {
            Err(Failure::Status(STATUS_ERROR))
        }
    }

    /// Moves `length` bytes between the file at `sector` and the chain's data buffers.
    fn transfer(
        &mut self,
        sector: u64,
        chain: &Chain,
        length: u32,
        write: bool,
    ) -> Result<(), Failure> {
        self.file.seek(SeekFrom::Start(sector * SECTOR_BYTES))?;
        self.dirty |= write;
        if write && chain.reaches_window() {
            return Ok(chain.copy_to(HEADER_BYTES, length as usize, &mut self.file)??);
        }
        let memory = chain.memory();
        let spans = if write {
            chain.readable_spans(HEADER_BYTES, length as usize)?
        } else {
            chain.writable_spans(0, length as usize)?
        };
        for (address, count) in spans {
            let done = if write {
                memory.write_all_volatile_to(address, &mut self.file, count)
            } else {
                memory.read_exact_volatile_from(address, &mut self.file, count)
            };
            done.map_err(|_| Failure::Status(STATUS_ERROR))?;
        }
        Ok(())
    }

    /// Discards or zeroes one segment: sector, count, flags (bit 0: may unmap).
    fn punch(&mut self, kind: u32, segment: &[u8; 16]) -> Result<(), Failure> {
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *segment;
        let sector = u64::from_le_bytes(sector);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let allowed = if kind == REQUEST_WRITE_ZEROES { 1 } else { 0 };
        if flags & !allowed != 0 {
            return Err(Failure::Status(STATUS_UNSUPPORTED));
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Failure::Status(STATUS_ERROR));
        }
        let (offset, bytes) = (
            sector.saturating_mul(SECTOR_BYTES),
            u64::from(count) * SECTOR_BYTES,
        );
        self.check(sector, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.dirty = true;
        let unmap = kind == REQUEST_DISCARD || flags & 1 != 0;
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        let done =
            rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, bytes);
        match done {
            Ok(()) => Ok(()),
            // Not every file system can: a discard is only advice, zeroes are written.
            Err(rustix::io::Errno::OPNOTSUPP) if kind == REQUEST_DISCARD => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(self.write_zeroes(offset, bytes)?),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn write_zeroes(&self, offset: u64, bytes: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < bytes {
            let count = usize::try_from(bytes - done).map_or(ZEROES.len(), |n| n.min(ZEROES.len()));
            self.file
                .write_all_at(ZEROES.get(..count).unwrap_or_default(), offset + done)?;
            done += count as u64;
        }
        Ok(())
    }
}

impl Persist for Block {
    const UNIT: &'static str = "block";
    type State = BlockState;

    fn save(&self) -> Result<BlockState, Unsaveable> {
        Ok(BlockState {
            sectors: self.sectors,
            read_only: self.read_only,
            dirty: self.dirty,
        })
    }

    fn restore(&mut self, state: BlockState) -> Result<(), RestoreError> {
        if state.sectors != self.sectors || state.read_only != self.read_only {
            return Err(RestoreError::Mismatch {
                unit: Self::UNIT.to_owned(),
                why: format!(
                    "it had {} sectors, the file has {}",
                    state.sectors, self.sectors
                ),
            });
        }
        self.dirty = state.dirty;
        Ok(())
    }
}

impl VirtioDevice for Block {
    const ID: u32 = 2;

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn features(&self) -> u64 {
        let common = SEG_MAX | FLUSH | if self.has_large_blocks() { BLK_SIZE } else { 0 };
        if self.read_only {
            common | READ_ONLY
        } else {
            common | DISCARD | WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(());
        };
        while let Some(chain) = queue.pop()? {
            let filled = self.serve(&chain)?;
            queue.complete(&chain, filled)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests;
