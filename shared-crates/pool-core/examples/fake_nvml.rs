//! Fake of NVIDIA's management library (NVML) for tests. Reports fictional GPUs, and gives wrong answers, fails or hangs
//! as its script demands.
//!
//! The script is a file next to the library, with the library's name plus `.json`. Every call reads it again, so that a
//! test can change it while the library is loaded:
//!
//! ```json
//! {"driver": "580.95.05", "gpus": [{"name": "Fake H100", "uuid": "GPU-1", "total": 80, "used": 10, "free": 70,
//!   "utilization": 40, "temperature": 51, "power": 300000, "capability": [9, 0], "processes": [[4711, 5]],
//!   "hang": false, "lost": false, "index": 0, "process_count": 1}]}
//! ```
//!
//! A value that is left out is one that the GPU does not support. At the top level, `count` overrides the number of GPUs,
//! and `hang` makes the whole library hang.

// A C interface needs raw pointers and C names.
#![allow(unsafe_code, missing_docs, non_snake_case)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

const SUCCESS: c_uint = 0;
const INVALID_ARGUMENT: c_uint = 2;
const NOT_SUPPORTED: c_uint = 3;
const INSUFFICIENT_SIZE: c_uint = 7;
const GPU_IS_LOST: c_uint = 15;

/// A GPU's index plus one, because a handle must not be null.
type Handle = *mut c_void;

#[repr(C)]
struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[repr(C)]
struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

#[repr(C)]
struct Process {
    pid: c_uint,
    used: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[repr(C)]
struct Symbol {
    file: *const c_char,
    base: *mut c_void,
    name: *const c_char,
    address: *mut c_void,
}

unsafe extern "C" {
    fn dladdr(address: *const c_void, found: *mut Symbol) -> c_int;
}

/// Reads the script of this copy of the library; null if it is missing or invalid.
fn script() -> Value {
    let mut found = Symbol {
        file: std::ptr::null(),
        base: std::ptr::null_mut(),
        name: std::ptr::null(),
        address: std::ptr::null_mut(),
    };
    // SAFETY: `found` is valid for writes, and the file name of a loaded library stays valid.
    let file = unsafe {
        if dladdr(nvmlInit_v2 as *const c_void, &mut found) == 0 {
            return Value::Null;
        }
        CStr::from_ptr(found.file).to_string_lossy().into_owned()
    };
    let path = PathBuf::from(format!("{file}.json"));
    // Tests replace the script atomically, so it is always complete.
    let text = std::fs::read_to_string(path).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Returns the script's entry for a GPU. Blocks while the GPU or the whole library hangs.
fn gpu(handle: Handle) -> Result<Value, c_uint> {
    let index = (handle as usize).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    loop {
        let script = script();
        let gpu = script["gpus"].get(index).ok_or(INVALID_ARGUMENT)?;
        if script["hang"] == true || gpu["hang"] == true {
            std::thread::sleep(Duration::from_millis(10));
        } else if gpu["lost"] == true {
            return Err(GPU_IS_LOST);
        } else {
            return Ok(gpu.clone());
        }
    }
}

fn figure(handle: Handle, name: &str) -> Result<Value, c_uint> {
    match &gpu(handle)?[name] {
        Value::Null => Err(NOT_SUPPORTED),
        value => Ok(value.clone()),
    }
}

fn number(handle: Handle, name: &str) -> Result<u64, c_uint> {
    figure(handle, name)?.as_u64().ok_or(NOT_SUPPORTED)
}

/// Writes a value to `out`, or returns its error code.
///
/// # Safety
///
/// `out` must be valid for writes of a `T`.
unsafe fn give<T>(out: *mut T, value: Result<T, c_uint>) -> c_uint {
    match value {
        Ok(value) => {
            // SAFETY: guaranteed by the caller.
            unsafe { out.write(value) };
            SUCCESS
        }
        Err(code) => code,
    }
}

/// Writes a text to `out`, truncated if it does not fit, with a zero byte at its end.
///
/// # Safety
///
/// `out` must be valid for writes of `length` bytes, and `length` must not be 0.
unsafe fn give_text(out: *mut c_char, length: c_uint, text: Result<Value, c_uint>) -> c_uint {
    let text = match &text {
        Ok(text) => text.as_str().unwrap_or_default().as_bytes(),
        Err(code) => return *code,
    };
    let kept = &text[..text.len().min(length as usize - 1)];
    // SAFETY: the kept bytes and the zero after them fit into `length` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(kept.as_ptr().cast(), out, kept.len());
        out.add(kept.len()).write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller passes a buffer of that length.
    unsafe { give_text(out, length, Ok(script()["driver"].clone())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> c_uint {
    let script = script();
    let listed = script["gpus"].as_array().map_or(0, Vec::len) as u64;
    let count = script["count"].as_u64().unwrap_or(listed);
    // SAFETY: the caller passes a pointer that is valid for writes, here and in the functions below.
    unsafe { give(out, Ok(count as c_uint)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, out: *mut Handle) -> c_uint {
    let handle = (index as usize + 1) as Handle;
    // SAFETY: as above.
    unsafe { give(out, gpu(handle).map(|_| handle)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetIndex(handle: Handle, out: *mut c_uint) -> c_uint {
    let index = match number(handle, "index") {
        Err(NOT_SUPPORTED) => Ok(handle as u64 - 1),
        said => said,
    };
    // SAFETY: as above.
    unsafe { give(out, index.map(|index| index as c_uint)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetName(handle: Handle, out: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller passes a buffer of that length.
    unsafe { give_text(out, length, figure(handle, "name")) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUUID(handle: Handle, out: *mut c_char, length: c_uint) -> c_uint {
    // SAFETY: the caller passes a buffer of that length.
    unsafe { give_text(out, length, figure(handle, "uuid")) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: Handle, out: *mut Memory) -> c_uint {
    let memory = || {
        Ok(Memory {
            version: 0,
            total: number(handle, "total")?,
            reserved: 0,
            free: number(handle, "free")?,
            used: number(handle, "used")?,
        })
    };
    // SAFETY: as above.
    unsafe { give(out, memory()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUtilizationRates(
    handle: Handle,
    out: *mut Utilization,
) -> c_uint {
    let rates = number(handle, "utilization").map(|percent| Utilization {
        gpu: percent as c_uint,
        memory: 0,
    });
    // SAFETY: as above.
    unsafe { give(out, rates) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperature(
    handle: Handle,
    _sensor: c_uint,
    out: *mut c_uint,
) -> c_uint {
    // SAFETY: as above.
    unsafe { give(out, number(handle, "temperature").map(|n| n as c_uint)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerUsage(handle: Handle, out: *mut c_uint) -> c_uint {
    // SAFETY: as above.
    unsafe { give(out, number(handle, "power").map(|n| n as c_uint)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    handle: Handle,
    major: *mut c_int,
    minor: *mut c_int,
) -> c_uint {
    let part = |place: usize| {
        let pair = figure(handle, "capability")?;
        Ok(pair[place].as_i64().ok_or(NOT_SUPPORTED)? as c_int)
    };
    // SAFETY: as above.
    match unsafe { give(major, part(0)) } {
        // SAFETY: as above.
        SUCCESS => unsafe { give(minor, part(1)) },
        code => code,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: Handle,
    count: *mut c_uint,
    out: *mut Process,
) -> c_uint {
    let gpu = match gpu(handle) {
        Ok(gpu) => gpu,
        Err(code) => return code,
    };
    let listed = gpu["processes"].as_array().cloned().unwrap_or_default();
    let said = gpu["process_count"].as_u64().unwrap_or(listed.len() as u64);
    // SAFETY: `count` is valid for reads and writes, and on entry holds the number of elements that fit at `out`.
    unsafe {
        let room = *count as usize;
        count.write(said as c_uint);
        if said == 0 {
            return SUCCESS;
        }
        if room < said as usize {
            return INSUFFICIENT_SIZE;
        }
        for (place, pair) in listed.iter().enumerate().take(room) {
            out.add(place).write(Process {
                pid: pair[0].as_u64().unwrap_or(0) as c_uint,
                used: pair[1].as_u64().unwrap_or(c_ulonglong::MAX),
                gpu_instance: c_uint::MAX,
                compute_instance: c_uint::MAX,
            });
        }
    }
    SUCCESS
}
