//! Which NVML functions are exported, and what do they answer?
//!
//! Names, structures and codes follow nvml.h of driver 570; nvml-wrapper 0.13 looks all symbols up when it opens the
//! library, and calls these. A device handle is the index of the card plus one, as a pointer: never null, never
//! followed. Nothing unwinds across the boundary: each function runs inside `guarded`, which turns a panic into code
//! 999.
//!
//! What all the functions below ask of their caller is what NVML asks: an output pointer is null or valid for a write
//! of its type, and a buffer holds at least as many elements as the length that comes with it.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::file::{SimDevice, SimFile, SimProcess};
use crate::state::{self, Call, Code};

/// An opaque device handle.
pub type Handle = *mut c_void;

/// `nvmlMemory_t`: here `used` includes what the driver reserves.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
#[expect(missing_docs, reason = "fields as in nvml.h")]
pub struct MemoryV1 {
    pub total: c_ulonglong,
    pub free: c_ulonglong,
    pub used: c_ulonglong,
}

/// `nvmlMemory_v2_t`: here `used` excludes what the driver reserves.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
#[expect(missing_docs, reason = "fields as in nvml.h")]
pub struct MemoryV2 {
    pub version: c_uint,
    pub total: c_ulonglong,
    pub reserved: c_ulonglong,
    pub free: c_ulonglong,
    pub used: c_ulonglong,
}

/// `nvmlProcessInfo_t` (version 2 and 3 of the process calls).
#[repr(C)]
#[derive(Debug, Copy, Clone)]
#[expect(missing_docs, reason = "fields as in nvml.h")]
pub struct ProcessInfo {
    pub pid: c_uint,
    pub used: c_ulonglong,
    pub gpu_instance: c_uint,
    pub compute_instance: c_uint,
}

/// `nvmlUtilization_t`.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
#[expect(missing_docs, reason = "fields as in nvml.h")]
pub struct Utilization {
    pub gpu: c_uint,
    pub memory: c_uint,
}

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Debug, Copy, Clone)]
#[expect(missing_docs, reason = "fields as in nvml.h")]
pub struct PciInfo {
    pub bus_id_legacy: [c_char; 16],
    pub domain: c_uint,
    pub bus: c_uint,
    pub device: c_uint,
    pub device_id: c_uint,
    pub subsystem_id: c_uint,
    pub bus_id: [c_char; 32],
}

/// `NVML_VALUE_NOT_AVAILABLE` of a 64-bit value.
const NOT_AVAILABLE: c_ulonglong = c_ulonglong::MAX;

/// "No GPU instance" and "no compute instance".
const NO_INSTANCE: c_uint = c_uint::MAX;

/// `NVML_STRUCT_VERSION(Memory, 2)`: size of the structure, and the version in the highest byte.
const MEMORY_V2_VERSION: c_uint = 40 | (2 << 24);
const _: () = assert!(size_of::<MemoryV2>() == 40);

// ---- library ---------------------------------------------------------------------------------------------------

/// Starts the library: fails as the file says.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    guarded(|| match state::machine()?.init_error {
        Some(code) if code != 0 => Err(Code(code)),
        _ => Ok(()),
    })
}

/// As [`nvmlInit_v2`]; the flags are ignored.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> c_uint {
    nvmlInit_v2()
}

/// Ends the library. What has broken stays broken.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    0
}

/// Returns a text for a code; the same for all.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(_code: c_uint) -> *const c_char {
    c"simulated NVML code".as_ptr()
}

/// Writes the driver's version.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller promises `length` writable characters.
    guarded(|| unsafe { write_text(version, length, &state::machine()?.driver_version) })
}

/// Writes the library's version.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetNVMLVersion(version: *mut c_char, length: c_uint) -> c_uint {
    guarded(|| {
        let text = format!("12.{}", state::machine()?.driver_version);
        // SAFETY: the caller promises `length` writable characters.
        unsafe { write_text(version, length, &text) }
    })
}

/// Writes the CUDA version of the driver.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    guarded(|| unsafe { write(version, state::machine()?.cuda_version) })
}

// ---- finding a card --------------------------------------------------------------------------------------------

/// Writes how many cards there are.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_uint {
    guarded(|| {
        let devices = state::machine()?.devices.len();
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { write(count, c_uint::try_from(devices).map_err(|_| Code::UNKNOWN)?) }
    })
}

/// Writes the handle of the card at `index`.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, handle: *mut Handle) -> c_uint {
    guarded(|| {
        let machine = state::machine()?;
        let index = usize::try_from(index).map_err(|_| Code::INVALID_ARGUMENT)?;
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { give_handle(&machine, index, Code::INVALID_ARGUMENT, handle) }
    })
}

/// Writes the handle of the card with this UUID.
///
/// # Safety
///
/// See the module; `uuid` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, handle: *mut Handle) -> c_uint {
    guarded(|| {
        let machine = state::machine()?;
        // SAFETY: the caller promises null or a C string.
        let wanted = unsafe { read_text(uuid) }?;
        let index = machine.devices.iter().position(|device| device.uuid == wanted);
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { give_handle(&machine, index.ok_or(Code::NOT_FOUND)?, Code::NOT_FOUND, handle) }
    })
}

/// Writes the handle of the card at this PCI address.
///
/// # Safety
///
/// See the module; `bus_id` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(
    bus_id: *const c_char,
    handle: *mut Handle,
) -> c_uint {
    guarded(|| {
        let machine = state::machine()?;
        // SAFETY: the caller promises null or a C string.
        let wanted = unsafe { read_text(bus_id) }?;
        let index =
            (0..machine.devices.len()).find(|index| pci_address(*index).eq_ignore_ascii_case(&wanted));
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { give_handle(&machine, index.ok_or(Code::NOT_FOUND)?, Code::NOT_FOUND, handle) }
    })
}

// ---- what a card is --------------------------------------------------------------------------------------------

/// Writes the index of a card.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetIndex(device: Handle, index: *mut c_uint) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    asked(device, |_, _, at| unsafe { write(index, c_uint::try_from(at).map_err(|_| Code::UNKNOWN)?) })
}

/// Writes the number of the device node: here it is the index.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMinorNumber(device: Handle, number: *mut c_uint) -> c_uint {
    // SAFETY: this function's caller promises what that function asks for.
    unsafe { nvmlDeviceGetIndex(device, number) }
}

/// Writes the UUID of a card.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: Handle, uuid: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller promises `length` writable characters.
    asked(device, |_, card, _| unsafe { write_text(uuid, length, &card.uuid) })
}

/// Writes the product name of a card.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: Handle, name: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller promises `length` writable characters.
    asked(device, |_, card, _| unsafe { write_text(name, length, &card.name) })
}

/// Writes the compute capability of a card.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    device: Handle,
    major: *mut c_int,
    minor: *mut c_int,
) -> c_uint {
    asked(device, |_, card, _| {
        let (a, b) = card.compute_capability.split_once('.').ok_or(Code::UNKNOWN)?;
        let (a, b) = (a.parse().map_err(|_| Code::UNKNOWN)?, b.parse().map_err(|_| Code::UNKNOWN)?);
        // SAFETY: the caller promises null or valid pointers.
        unsafe { write(major, a).and_then(|()| write(minor, b)) }
    })
}

/// Writes the PCI address of a card: bus number index + 1.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(device: Handle, info: *mut PciInfo) -> c_uint {
    asked(device, |_, _, at| {
        let mut answer = PciInfo {
            bus_id_legacy: [0; 16],
            domain: 0,
            bus: c_uint::try_from(at + 1).map_err(|_| Code::UNKNOWN)?,
            device: 0,
            device_id: 0x10de,
            subsystem_id: 0,
            bus_id: [0; 32],
        };
        let address = pci_address(at);
        copy_characters(&mut answer.bus_id, &address);
        // The old form has four digits of the domain, this one eight.
        copy_characters(&mut answer.bus_id_legacy, address.get(4..).unwrap_or_default());
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { write(info, answer) }
    })
}

// ---- how a card is set -----------------------------------------------------------------------------------------

/// Writes whether MIG is on: now, and after the next reset.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: Handle,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> c_uint {
    asked(device, |_, card, _| {
        let mode = c_uint::from(card.mig.ok_or(Code::NOT_SUPPORTED)?);
        // SAFETY: the caller promises null or valid pointers.
        unsafe { write(current, mode).and_then(|()| write(pending, mode)) }
    })
}

/// Writes how many slices a card could have: 7 with MIG on, else none.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(device: Handle, count: *mut c_uint) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    asked(device, |_, card, _| unsafe { write(count, if card.mig == Some(true) { 7 } else { 0 }) })
}

/// Answers that there is no such slice: none are simulated.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: Handle,
    _index: c_uint,
    _slice: *mut Handle,
) -> c_uint {
    asked(device, |_, _, _| Err(Code::NOT_FOUND))
}

/// Writes the compute mode of a card.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeMode(device: Handle, mode: *mut c_uint) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    asked(device, |_, card, _| unsafe { write(mode, card.compute_mode.code()) })
}

// ---- what a card does ------------------------------------------------------------------------------------------

/// Writes the memory of a card; `used` and `free` leave no room for what is reserved.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo(device: Handle, info: *mut MemoryV1) -> c_uint {
    asked(device, |machine, card, _| {
        if card.unified {
            return Err(Code::NOT_SUPPORTED);
        }
        let memory = state::memory(machine, card);
        let used = memory.used.saturating_add(memory.reserved);
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { write(info, MemoryV1 { total: memory.total, free: memory.free, used }) }
    })
}

/// Writes the memory of a card, the reserved part apart. The caller states the version.
///
/// # Safety
///
/// See the module; `info` is valid for reads too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: Handle, info: *mut MemoryV2) -> c_uint {
    asked(device, |machine, card, _| {
        if let Some(code) = machine.memory_v2_error.filter(|code| *code != 0) {
            return Err(Code(code));
        }
        if card.unified {
            return Err(Code::NOT_SUPPORTED);
        }
        if info.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, and the caller promises a valid structure with its version filled in.
        let version = unsafe { (*info).version };
        if version != MEMORY_V2_VERSION {
            return Err(Code(25)); // NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        }
        let state::Memory { total, reserved, used, free } = state::memory(machine, card);
        // SAFETY: the caller promises a valid pointer.
        unsafe { write(info, MemoryV2 { version, total, reserved, free, used }) }
    })
}

/// Writes the computing processes of a card, or how many there are when the room is too small.
///
/// # Safety
///
/// See the module; `count` is valid for reads too, and says how many elements `infos` has.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: Handle,
    count: *mut c_uint,
    infos: *mut ProcessInfo,
) -> c_uint {
    asked(device, |machine, card, _| {
        let processes = state::processes(machine, card);
        // SAFETY: the caller promises what `write_processes` asks for.
        unsafe { write_processes(&processes, count, infos) }
    })
}

/// Writes that no process draws.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    device: Handle,
    count: *mut c_uint,
    infos: *mut ProcessInfo,
) -> c_uint {
    // SAFETY: the caller promises what `write_processes` asks for.
    asked(device, |_, _, _| unsafe { write_processes(&[], count, infos) })
}

/// Writes how busy a card is: fully when it has processes.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(device: Handle, rates: *mut Utilization) -> c_uint {
    asked(device, |machine, card, _| {
        let gpu = if state::processes(machine, card).is_empty() { 0 } else { 100 };
        // SAFETY: the caller promises null or a valid pointer.
        unsafe { write(rates, Utilization { gpu, memory: gpu / 2 }) }
    })
}

/// Writes the temperature of a card in degrees Celsius: 40.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(
    device: Handle,
    _sensor: c_uint,
    temperature: *mut c_uint,
) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    asked(device, |_, _, _| unsafe { write(temperature, 40) })
}

/// Writes the power of a card in milliwatts: 60 W.
///
/// # Safety
///
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: Handle, power: *mut c_uint) -> c_uint {
    // SAFETY: the caller promises null or a valid pointer.
    asked(device, |_, _, _| unsafe { write(power, 60_000) })
}

// ---- crossing the boundary -------------------------------------------------------------------------------------

/// Runs `answer` and returns its code; a panic becomes 999 and stays on this side.
fn guarded(answer: impl FnOnce() -> Result<(), Code>) -> c_uint {
    match catch_unwind(AssertUnwindSafe(answer)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code.0,
        Err(_) => Code::UNKNOWN.0,
    }
}

/// Runs `answer` with the card behind the handle and its index, unless the card is broken.
fn asked(device: Handle, answer: impl FnOnce(&SimFile, &SimDevice, usize) -> Result<(), Code>) -> c_uint {
    guarded(|| {
        let machine = state::machine()?;
        let index = device.addr().checked_sub(1).ok_or(Code::INVALID_ARGUMENT)?;
        let card = machine.devices.get(index).ok_or(Code::INVALID_ARGUMENT)?;
        state::count_call(card, Call::Question)?;
        answer(&machine, card, index)
    })
}

/// Writes the handle of the card at `index`; `absent` when there is none.
///
/// # Safety
///
/// `handle` is null or valid for a write.
unsafe fn give_handle(
    machine: &SimFile,
    index: usize,
    absent: Code,
    handle: *mut Handle,
) -> Result<(), Code> {
    let card = machine.devices.get(index).ok_or(absent)?;
    state::count_call(card, Call::Handle)?;
    // SAFETY: this function's caller promises the same.
    unsafe { write(handle, std::ptr::without_provenance_mut(index + 1)) }
}

/// Writes `value`, or answers "invalid argument" to a null pointer.
///
/// # Safety
///
/// `to` is null or valid for a write.
unsafe fn write<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    // SAFETY: not null, so valid for a write, as the caller promises.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes `text` with its NUL.
///
/// # Safety
///
/// `to` is null or valid for a write of `length` characters.
unsafe fn write_text(to: *mut c_char, length: c_uint, text: &str) -> Result<(), Code> {
    if to.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    let room = usize::try_from(length).map_err(|_| Code::INVALID_ARGUMENT)?;
    if text.len() >= room {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    // SAFETY: `text` and its NUL fit into `length`, and the two do not overlap: `text` is our own allocation.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast::<c_char>(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// Returns the text behind a C string.
///
/// # Safety
///
/// `from` is null or a C string.
unsafe fn read_text(from: *const c_char) -> Result<String, Code> {
    if from.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    // SAFETY: not null, so a C string, as the caller promises.
    let text = unsafe { CStr::from_ptr(from) };
    text.to_str().map(str::to_owned).map_err(|_| Code::INVALID_ARGUMENT)
}

/// Writes the processes when they fit, and their number in any case.
///
/// # Safety
///
/// `count` is null or valid for a read and a write; `infos` is null or has room for as many elements as it says.
unsafe fn write_processes(
    processes: &[SimProcess],
    count: *mut c_uint,
    infos: *mut ProcessInfo,
) -> Result<(), Code> {
    if count.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    let needed = c_uint::try_from(processes.len()).map_err(|_| Code::UNKNOWN)?;
    // SAFETY: not null, so valid for a read and a write, as the caller promises.
    let room = unsafe { count.replace(needed) };
    if processes.is_empty() {
        return Ok(());
    }
    if room < needed || infos.is_null() {
        return Err(Code::INSUFFICIENT_SIZE);
    }
    for (at, process) in processes.iter().enumerate() {
        let info = ProcessInfo {
            pid: process.pid,
            used: process.used.unwrap_or(NOT_AVAILABLE),
            gpu_instance: NO_INSTANCE,
            compute_instance: NO_INSTANCE,
        };
        // SAFETY: `at` is below `needed`, which is not above `room`, the number of elements that the caller promises.
        unsafe { infos.add(at).write(info) };
    }
    Ok(())
}

/// Returns the PCI address of the card at `index`.
fn pci_address(index: usize) -> String {
    format!("00000000:{:02X}:00.0", index + 1)
}

/// Copies as much of `text` as fits and leaves a NUL at the end of a zeroed buffer.
fn copy_characters(to: &mut [c_char], text: &str) {
    let room = to.len().saturating_sub(1);
    for (slot, byte) in to.iter_mut().take(room).zip(text.bytes()) {
        *slot = c_char::from_ne_bytes([byte]);
    }
}
