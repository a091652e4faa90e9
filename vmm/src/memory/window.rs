//! A window: guest-physical addresses above RAM at which pieces of host files can be shown.
//!
//! The addresses are reserved in this process once, so that KVM knows the window as one slot for
//! good: showing a file is an mmap(2) within it, and the guest then shares the host's page cache.
//! Where nothing is shown the host refuses every access, and a guest that makes one ends; nothing
//! in this process ever touches the mapping itself, see [`Window::read`]. A piece is a whole number
//! of [`Window::CHUNK`]s, which bounds the mappings that a guest can have its host make.
//!
//! ```text
//! … RAM │ … │ 1 GiB aligned: ▒▒▒▒ file ▒▒│ nothing │▒▒ file ▒▒│▒▒ … │
//! ```

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::{GAP_END, HUGE_PAGE, MemoryError, ram_ranges};

/// What a window's place is a multiple of: as much as one entry of the guest's page tables maps.
const PLACE: u64 = 1 << 30;

/// Where files can be shown to a guest.
#[derive(Debug)]
pub struct Window {
    /// All that is reserved, and how much.
    room: *mut c_void,
    room_length: usize,
    /// The first huge page in it.
    start: *mut c_void,
    length: usize,
    address: u64,
}

// SAFETY: what lies behind the pointers is changed by system calls alone, which are atomic to
// each other, and is never referred to.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// What places, lengths and offsets are multiples of.
    pub const CHUNK: u64 = HUGE_PAGE;

    /// Reserves a window of `length` bytes for a guest with `ram_bytes` of RAM: its place is the
    /// same in every machine with as much.
    ///
    /// # Errors
    /// [`MemoryError::Window`] when the host refuses.
    pub fn reserve(ram_bytes: u64, length: u64) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Window { length, source };
        let room_length = usize::try_from(length.saturating_add(HUGE_PAGE)).unwrap_or(usize::MAX);
        let (access, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping that nothing else knows.
        let room =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), room_length, access, flags) }
                .map_err(|errno| refused(errno.into()))?;
        let end_of_ram = ram_ranges(ram_bytes).last().map_or(0, |range| range.end);
        Ok(Self {
            room,
            room_length,
            start: room.map_addr(|address| address.next_multiple_of(HUGE_PAGE as usize)),
            length: room_length - HUGE_PAGE as usize,
            address: end_of_ram.max(GAP_END).next_multiple_of(PLACE),
        })
    }

    /// Guest-physical address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Where it lies in this process, for KVM.
    pub(crate) fn host_address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// Whether all of a range of guest-physical addresses is in the window.
    #[must_use]
    pub fn contains(&self, address: u64, length: u64) -> bool {
        let offset = address.checked_sub(self.address);
        let end = offset.and_then(|offset| offset.checked_add(length));
        end.is_some_and(|end| end <= self.length())
    }

    /// Shows `length` bytes of `file` from `offset` on, at `place` from the window's start, to be
    /// read alone. What lay there before must have been taken away; the last chunk's end, if that
    /// is no whole one, shows nothing. Whoever shows a file sees to it that it isn't cut.
    ///
    /// # Errors
    /// `EINVAL` for what isn't within the window or doesn't begin at a chunk; mmap(2)'s.
    pub fn show(&self, place: u64, file: &File, offset: u64, length: u64) -> io::Result<()> {
        let (start, length) = self.range(&(place..place.saturating_add(length)))?;
        if !offset.is_multiple_of(Self::CHUNK) {
            return Err(Errno::INVAL.into());
        }
        let (access, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: the range lies in what this value has reserved, and nothing refers to it.
        unsafe { rustix::mm::mmap(start, length, access, flags, file, offset) }?;
        Ok(())
    }

    /// Has nothing shown in a range of chunks: a guest that reaches there ends.
    ///
    /// # Errors
    /// As [`Window::show`].
    pub fn clear(&self, places: &Range<u64>) -> io::Result<()> {
        self.replace(places, ProtFlags::empty())
    }

    /// Has zeros shown in a range of chunks, for what is taken away behind a guest's back.
    ///
    /// # Errors
    /// As [`Window::show`].
    pub fn blank(&self, places: &Range<u64>) -> io::Result<()> {
        self.replace(places, ProtFlags::READ)
    }

    fn replace(&self, places: &Range<u64>, access: ProtFlags) -> io::Result<()> {
        let (start, length) = self.range(places)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `show`.
        unsafe { rustix::mm::mmap_anonymous(start, length, access, flags) }?;
        Ok(())
    }

    /// Where a range of the window that begins at a chunk lies in this process.
    fn range(&self, places: &Range<u64>) -> Result<(*mut c_void, usize), Errno> {
        let within = places.start < places.end && places.end <= self.length();
        if !within || !places.start.is_multiple_of(Self::CHUNK) {
            return Err(Errno::INVAL);
        }
        let begin = usize::try_from(places.start).map_err(|_| Errno::INVAL)?;
        let length = usize::try_from(places.end - places.start).map_err(|_| Errno::INVAL)?;
        Ok((self.start.map_addr(|start| start + begin), length))
    }

    /// Reads what is shown at a guest-physical address, for a device that was given it. By a
    /// system call, to which a page that isn't there is an error; to us it would be the end.
    ///
    /// # Errors
    /// `EFAULT` where nothing is shown, and what stands against reading the file.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.contains(address, buffer.len() as u64) {
            return Err(Errno::FAULT.into());
        }
        let offset = usize::try_from(address - self.address).map_err(|_| Errno::FAULT)?;
        let to = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let from = libc::iovec {
            iov_base: self.start.map_addr(|start| start + offset),
            iov_len: buffer.len(),
        };
        let own = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: the kernel writes to `buffer` alone, and no further than it goes.
        let count = unsafe { libc::process_vm_readv(own, &raw const to, 1, &raw const from, 1, 0) };
        match usize::try_from(count) {
            Ok(count) if count == buffer.len() => Ok(()),
            Ok(_) => Err(Errno::FAULT.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the reservation is this value's own, and nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.room, self.room_length) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const CHUNK: u64 = Window::CHUNK;

    fn file(chunks: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for chunk in 0..chunks {
            let byte = u8::try_from(chunk + 1).unwrap();
            file.write_all(&vec![byte; CHUNK as usize]).unwrap();
        }
        file
    }

    fn byte(window: &Window, place: u64) -> io::Result<u8> {
        let mut byte = [0];
        window.read(window.address() + place, &mut byte)?;
        Ok(byte[0])
    }

    #[test]
    fn its_place_follows_from_the_size_of_ram() {
        let place = |ram| Window::reserve(ram, CHUNK).unwrap().address();
        assert_eq!(place(64 << 20), 4 << 30);
        assert_eq!(place(3 << 30), 4 << 30);
        assert_eq!(place((3 << 30) + (2 << 20)), 5 << 30);
        assert_eq!(place(8 << 30), 9 << 30);
        let window = Window::reserve(64 << 20, 3 * CHUNK).unwrap();
        assert!(window.host_address().is_multiple_of(CHUNK));
        assert_eq!(window.length(), 3 * CHUNK);
        assert!(window.contains(4 << 30, 3 * CHUNK) && !window.contains(4 << 30, 3 * CHUNK + 1));
        assert!(!window.contains((4 << 30) - 1, 1) && !window.contains(5 << 30, u64::MAX));
    }

    #[test]
    fn it_shows_what_it_is_told_and_nothing_else() {
        let window = Window::reserve(64 << 20, 3 * CHUNK).unwrap();
        let nothing =
            |place| byte(&window, place).unwrap_err().raw_os_error() == Some(libc::EFAULT);
        assert!(nothing(0) && nothing(3 * CHUNK));
        let file = file(2);
        window.show(CHUNK, &file, 0, CHUNK + 4096).unwrap();
        assert!(nothing(CHUNK - 1));
        assert_eq!(byte(&window, CHUNK).unwrap(), 1);
        assert_eq!(byte(&window, 2 * CHUNK + 4095).unwrap(), 2);
        assert!(nothing(2 * CHUNK + 4096));
        window.clear(&(CHUNK..2 * CHUNK)).unwrap();
        window.blank(&(2 * CHUNK..3 * CHUNK)).unwrap();
        assert!(nothing(CHUNK));
        assert_eq!(byte(&window, 2 * CHUNK).unwrap(), 0);
        // A file that was cut is an error to whoever reads, and nothing more.
        window.show(0, &file, 0, CHUNK).unwrap();
        file.set_len(0).unwrap();
        assert!(nothing(0));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let window = Window::reserve(64 << 20, 2 * CHUNK).unwrap();
        let file = file(1);
        for (place, offset, length) in [
            (0, 0, 0),
            (4096, 0, CHUNK),
            (0, 4096, CHUNK),
            (CHUNK, 0, CHUNK + 1),
            (2 * CHUNK, 0, 1),
            (u64::MAX - CHUNK + 1, 0, CHUNK),
            (0, 0, u64::MAX),
        ] {
            let refused = window.show(place, &file, offset, length).unwrap_err();
            assert_eq!(
                refused.raw_os_error(),
                Some(libc::EINVAL),
                "{place} {length}"
            );
        }
        assert!(window.clear(&(0..3 * CHUNK)).is_err());
        assert!(window.blank(&(1..CHUNK)).is_err());
    }
}
