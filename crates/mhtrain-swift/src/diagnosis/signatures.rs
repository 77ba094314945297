//! Which words mean which cause?
//!
//! The wordings are those of torch, transformers, accelerate, deepspeed, bitsandbytes, datasets, the hubs, NCCL,
//! HCCL, Python, the launchers and the C libraries under them. Where two entries match one line the earlier one
//! holds: look-alikes stand before what they look like.

use std::sync::LazyLock;

use mhtrain_job::diagnosis::Kind;

use super::filter::Filter;

/// Where a signature may stand to mean what it says.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// In an exception or an error message only; printed by the way it is worth little.
    Raised,
    /// On any line that is not informational: C libraries print their last words without a logger.
    Printed,
    /// On any line of any level.
    Always,
    /// Out of memory that the trainer itself caught and survived.
    Caught,
    /// Usual consequence of something else: weaker than any cause that is spelled out.
    Symptom,
    /// A kill that nobody explains.
    Kill,
    /// What the survivors of another death print.
    Echo,
}

/// One wording.
pub(super) struct Signature {
    pub(super) kind: Kind,
    pub(super) form: Form,
    pattern: &'static str,
}

const fn raised(kind: Kind, pattern: &'static str) -> Signature {
    Signature { kind, form: Form::Raised, pattern }
}

const fn printed(kind: Kind, pattern: &'static str) -> Signature {
    Signature { kind, form: Form::Printed, pattern }
}

const fn form(kind: Kind, form: Form, pattern: &'static str) -> Signature {
    Signature { kind, form, pattern }
}

use Kind::{
    BadArguments, BadData, CheckpointCorrupt, CodeError, Communication, DeviceFault, DeviceOom, DiskFull,
    Diverged, HostOom, IncompatibleEnvironment, Interrupted, MissingModelOrDataset, Network,
};

/// Every wording, look-alikes first. Patterns ignore case.
const SIGNATURES: &[Signature] = &[
    raised(BadArguments, r"feature requires a flash attention"),
    // Memory words that do not mean the card's memory.
    raised(
        IncompatibleEnvironment,
        r"outofresources|out of resources?: ?(?:shared memory|threads|tensor memory|registers)",
    ),
    raised(IncompatibleEnvironment, r"cannot allocate memory in static tls block"),
    raised(IncompatibleEnvironment, r"too many resources requested for launch"),
    raised(BadData, r"decompressionbomb"),
    // The host's memory.
    form(
        HostOom,
        Form::Always,
        r"oom[-_ ]?kill(?:ed|er)?\b(?:.*\b(?:event|invoked|task|process|container|constraint)|$|[ :=])",
    ),
    form(
        HostOom,
        Form::Always,
        r"memory cgroup out of memory|out of memory: kill(?:ed)? process|cgroup out-of-memory handler",
    ),
    form(
        HostOom,
        Form::Always,
        r"\boomkilled\b|node running low on memory|ray\.exceptions\.outofmemoryerror|\d+ workers? .*killed due to memory pressure",
    ),
    printed(
        HostOom,
        r"defaultcpuallocator|cpuallocator\.cpp|alloc_cpu\.cpp|not enough memory: you tried to allocate|buy new ram",
    ),
    printed(
        HostOom,
        r"java\.lang\.outofmemoryerror|std::bad_alloc|arrowmemoryerror|(?:malloc|realloc) of size \d+ failed",
    ),
    printed(
        HostOom,
        r"memory allocation of \d+ bytes failed|mmap failed: cannot allocate|^(?:fatal error: )?out of memory allocating heap",
    ),
    raised(
        HostOom,
        r"^(?:\w+\.)*_?(?:array)?memoryerror\b|unable to allocate [\d.,]+ ?[kmgtpe]?i?b(?:ytes)? for an array",
    ),
    printed(
        HostOom,
        r"paging file is too small|winerror 1455|os error 1455|winerror 8\b|not enough (?:memory|quota) (?:resources )?(?:is|are) available to process this command",
    ),
    printed(
        HostOom,
        r"dataloader worker \(pid\(?s?\)? [\d, ]+\) (?:is|was) killed by signal: (?:killed|bus error)",
    ),
    printed(
        HostOom,
        r"insufficient shared memory|out of shared memory|unexpected bus error|unable to (?:write|mmap|resize)[^:]*(?:file|bytes)?.*(?:/torch_|shm|shared memory|cannot allocate)",
    ),
    printed(
        HostOom,
        r"no space left on device.*/dev/shm|/dev/shm.*no space left on device|error while creating shared memory segment|posix_fallocate failed|shared memory segment.*no space",
    ),
    raised(HostOom, r"shared memory.*(?:no space|too small|increase)|unable to open shared memory object"),
    printed(
        HostOom,
        r"cudahostalloc.*(?:failed|out of memory)|cudahostregister.*(?:failed|out of memory)|failed to (?:allocate|pin) (?:pinned|page-locked|host) memory|(?:pinned|host) memory allocation failed",
    ),
    raised(
        HostOom,
        r"\[errno 12\]|errno 12\b|os error 12\b|(?:fork|mmap|malloc|clone|spawn).{0,60}cannot allocate memory|\bcannot allocate memory\b",
    ),
    raised(
        HostOom,
        r"(?:cpu|host|system|ram) (?:is )?(?:ran )?out of memory|not enough (?:cpu|host|system) (?:memory|ram)|(?:cpu|host|system) memory (?:is )?(?:exhausted|insufficient)|oom when allocating tensor.*device:cpu",
    ),
    printed(
        HostOom,
        r"caught signal 7|signal 7 \(sigbus\)|\(core dumped\) *bus error|^bus error|exitcode\s*:\s*-7\b|fatal python error: bus error",
    ),
    printed(
        HostOom,
        r"worker.*(?:terminated|died).*(?:memory|oom)|a process in the process pool was terminated abruptly|one of the subprocesses has abruptly died during map operation|terminatedworkererror",
    ),
    // The card's memory, caught and survived.
    form(
        DeviceOom,
        Form::Caught,
        r"(?:ran out of memory|\boom\b|out of memory).{0,60}(?:skipping|skipped|batch removed|retrying|dropping|ignor)|(?:skipping|skipped|dropping) .{0,40}(?:\boom\b|out of memory)",
    ),
    // The card's memory.
    printed(
        DeviceOom,
        r"\b(?:cuda|hip|rocm|npu|xpu|dpcpp|sycl|musa|mlu|gcu|hpu|dcu|mps(?: backend)?|vulkan|gpu|device|tpu) (?:is )?(?:ran )?out of (?:device )?memory",
    ),
    printed(DeviceOom, r"^(?:\w+\.)*outofmemoryerror\b|torch\.(?:cuda\.)?outofmemoryerror"),
    printed(
        DeviceOom,
        r"(?:cuda|hip|triton|cudart|nvrtc|accelerator|driver|cusparse|cufft|cublas|nccl|rccl)[\w \[\]()./]*(?:error|failure|err)[^:'\x22]{0,30}[:=]? ?(?:\d+ )?['\x22(]?(?:\(\d+\) ?: )?out of memory",
    ),
    printed(
        DeviceOom,
        r"cuda runtime error \(2\)|thcudacheck fail.*out of memory|error=2 : out of memory|cudaerror(?:memoryallocation|outofmemory)|cuda_error_out_of_memory|hiperroroutofmemory|hip_error_out_of_memory|musa_error_out_of_memory",
    ),
    printed(DeviceOom, r"^error out of memory at line \d+|error code: ?2, reason: out of memory"),
    printed(
        DeviceOom,
        r"(?:cublas|cudnn|cusparse|cusolver|cufft|hipblas|rocblas|miopen|mublas|mudnn)\w*_(?:status_)?alloc_failed|cufft_alloc_failed|status_internal_error_device_allocation_failed|rocblas_status_memory_error|miopenstatusallocfailed",
    ),
    printed(
        DeviceOom,
        r"failed to cuda (?:calloc|malloc|host ?alloc)|cudamalloc(?:async|managed)?\b.{0,40}(?:failed|out of memory)|failed to (?:cuda)?malloc.{0,30}(?:device|gpu)|failed to allocate (?:device|gpu|cuda|hbm) memory|nvml_success == r internal assert failed at .{0,80}allocator|cumem\w+.{0,60}out of memory",
    ),
    printed(
        DeviceOom,
        r"allocation on device.{0,60}would exceed|would exceed (?:the )?allowed memory|would exceed per_process_memory_fraction|can not allocate memory block with size larger",
    ),
    printed(
        DeviceOom,
        r"ur_result_error_out_of_(?:device_memory|resources)|pi_error_out_of_(?:resources|device)|ze_result_error_out_of_device_memory|cl_(?:out_of_resources|mem_object_allocation_failure)",
    ),
    printed(
        DeviceOom,
        r"memory_allocation_failure|\bel0004\b|aclrtmalloc.{0,60}(?:failed|error)|rtmalloc.{0,40}failed|error code(?: is)? ?:? ?(?:207001|207018)|device memory alloc(?:ation)? fail",
    ),
    raised(
        DeviceOom,
        r"resource_?exhausted(?:error)?\b.{0,80}(?:out of memory|oom when|allocat)|oom when allocating tensor|resource exhausted: (?:out of memory|oom)",
    ),
    printed(
        DeviceOom,
        r"no executable batch size found|no available memory for the cache blocks|free memory on device.{0,60}is less than desired|kv cache is needed, which is larger than the available|kv cache.{0,120}larger than the (?:maximum|available)",
    ),
    raised(
        DeviceOom,
        r"enough gpu ram to fit|not enough (?:gpu|device|video|cuda|hbm) ?(?:memory|ram|vram)|insufficient (?:gpu|device|video|cuda) memory|(?:gpu|device) memory (?:is )?(?:exhausted|insufficient|not enough)|exceeds? (?:the )?(?:available )?gpu memory|out of (?:gpu|video|device|cuda) memory|out of vram",
    ),
    raised(
        DeviceOom,
        r"^(?:[\w.]+(?:error|exception)|error)\b(?:[^a-z].*)?\bout of memory\b|^\w*\s*\bcuda oom\b|^oom: ran out of memory",
    ),
    printed(
        DeviceOom,
        r"failed to (?:allocate|reserve) [\d.]+ ?[kmg]i?b? ?(?:bytes )?(?:\([^)]*\) )?(?:on|from) (?:gpu|device|cuda)|bfc_allocator.*ran out of memory",
    ),
    // The disk.
    printed(
        DiskFull,
        r"no space left on (?:the )?device|\[errno 28\]|os error 28\b|\benospc\b|storagefull|disk quota exceeded|\[errno 122\]|os error 122\b|\bedquot\b",
    ),
    printed(
        DiskFull,
        r"not enough (?:free )?(?:disk )?space (?:on (?:the )?disk|to (?:download|save|store|write)|for)|there is not enough space on the disk|not enough disk space|insufficient (?:disk )?space|winerror 112|os error 112|disk (?:is )?full|no (?:free )?disk space|file system (?:is )?full|database or disk is full",
    ),
    raised(
        DiskFull,
        r"pytorchstreamwriter failed|unexpected pos \d+ vs \d+|enforce fail at inline_container|basic_ios::clear|iostream error|no usable temporary directory|failed (?:in )?writing (?:the )?(?:file|data|archive)|file write failed|error while serializing.*(?:i/?o|space)|could not write.*disk|short write",
    ),
    // Learning went wrong.
    printed(
        Diverged,
        r"current loss scale already at minimum|minimum loss scale reached|loss is probably exploding|attempted loss scale: 1(?:\.0)?, reducing to 1(?:\.0)?\b",
    ),
    printed(
        Diverged,
        r"loss (?:is|was|became|became infinite or|has become) (?:a )?(?:nan|inf|infinite|not (?:a )?finite)|(?:nan|inf(?:inity)?|non-?finite) (?:or \w+ )?(?:\w+ )?(?:loss|grad(?:ient)?s?)\b.{0,60}(?:detected|found|encountered|stop|abort|exit|raise|terminat|at (?:step|iter))|found (?:nan|inf)[\w/]* in (?:local )?(?:\w+ )*(?:grad|loss|forward|param)",
    ),
    raised(
        Diverged,
        r"loss (?:is )?(?:=|:)? ?(?:nan|inf)\b.*(?:stop|abort|exit|terminat)|returned nan values in its|gradients? (?:are|is|norm is|contains?|became|overflow).{0,20}(?:nan|inf|non-?finite)|(?:nan|inf)s? (?:in|detected in|found in) (?:the )?(?:\w+ )?(?:loss|grad|output|logits|weights|parameters)|total norm .* is non-finite|loss (?:diverged|exploded)|model (?:has )?diverged|training (?:has )?diverged",
    ),
    raised(
        Diverged,
        r"probability tensor contains either|floatingpointerror|returned in `?training_step`? is nan|input (?:x )?contains (?:nan|infinity|inf)|input contains infinity or a value too large|is (?:nan or inf|not finite)|nan or inf found in",
    ),
    // The card or its driver.
    printed(
        DeviceFault,
        r"uncorrectable (?:\(?\w*\)? ?)?(?:nvlink |ecc )?error|\bxid ?(?:error|\(|:|=|\d).{0,40}\d|\bxids?\b.{0,40}(?:error|code|event|reported|detected).{0,20}\d|fallen off the bus|gpu is lost|gpu has been lost|unable to determine the device handle|driver/library version mismatch|row remap|hbm multi bit ecc|uce error|ecc error",
    ),
    printed(
        DeviceFault,
        r"device-side assert\b|assertion `.{1,120}` failed|an illegal memory access|illegal (?:memory access|address|instruction)|misaligned address|unspecified launch failure|launch timed out and was terminated|hardware stack error|invalid (?:program counter|address space)|warp out-of-range address",
    ),
    printed(
        DeviceFault,
        r"memory access fault by gpu|hw exception by gpu|gpu hang|hsa_status_error|hiperror(?:illegaladdress|launchfailure)|device.lost\b|ur_result_error_device_lost|pi_error_device_not_available|ai ?core (?:exception|timeout|error)|vector core (?:exception|execution is abnormal)|ez9999|e[ez]9999: inner error|error code(?: is)?[ :=]*507\d{3}|device (?:is )?(?:faulty|unhealthy)|the device (?:task )?(?:abort|is abnormal)",
    ),
    printed(
        DeviceFault,
        r"failed to initialize nvml|nvml(?:_| )(?:error|shared library)|nvidia-smi (?:has )?failed|no (?:cuda-capable|gpus? were|cuda gpu|gpu) (?:device is detected|found|devices? (?:is|are) (?:found|detected))|no cuda-capable device|system not yet initialized|devices?(?:\(s\))? (?:is|are|is/are) busy or unavailable|os call failed or operation not supported",
    ),
    raised(
        DeviceFault,
        r"cuda (?:unknown error|error: unknown error)|cublas_status_(?:not_initialized|execution_failed|internal_error|mapping_error)|cudnn_status_(?:not_initialized|execution_failed|internal_error|mapping_error)|cusolver_status_(?:internal_error|execution_failed)|cuda_error_(?:unknown|launch_failed|illegal_address|ecc_uncorrectable|assert|hardware)|cuda error: (?:hardware|mps|exception)|cuda exception",
    ),
    // Limits of the code whose words would be taken for those of packages, data or arguments.
    raised(
        CodeError,
        r"cuda (?:driver )?error: invalid (?:argument|configuration|value|resource handle)|invalid configuration argument|cannot launch triton kernel|maximum cuda blocksize|expected all tensors to be on the same device|mat1 and mat2|shapes? .{0,40}cannot be multiplied|does not require grad|expected to have finished reduction|expected to mark a variable ready only once|trying to backward through the graph a second time|modified by an inplace operation|expected scalar type|input type .{0,60}should be the same|size of tensor|shape .{0,40}invalid for input|dimension out of range|stack expects each tensor|cannot pin|pin_memory|cannot re-initialize cuda in forked|meta tensor|index \S+ is out of bounds",
    ),
    // Packages, driver and card do not fit together.
    printed(
        IncompatibleEnvironment,
        r"no kernel image is available|invalid device function|device kernel image is invalid|forward compatibility was attempted|unsupported display driver|driver version is insufficient|nvidia driver on your system is too old|hiperrornobinaryforgpu|found no nvidia driver|not compiled with (?:cuda|rocm|xpu|npu)|no cuda gpus are available|cuda is not available|unsupported (?:ptx|toolchain)|ptxas (?:error|fatal)|named symbol not found",
    ),
    raised(
        IncompatibleEnvironment,
        r"undefined symbol|cannot open shared object|could not load (?:library|dynamic library)|shared object file|glibc(?:xx)?_[\d.]+.{0,20}not found|version `\w+_[\d.]+' not found|dll load failed|winerror (?:126|127|193)\b|symbol lookup error|wrong elf class|invalid elf header",
    ),
    raised(
        IncompatibleEnvironment,
        r"^(?:\w+\.)*(?:modulenotfounderror|importerror|packagenotfounderror|distributionnotfound|versionconflict|contextualversionconflict)\b|no module named|cannot import name|no package metadata was found|failed to import \S+ because",
    ),
    raised(
        IncompatibleEnvironment,
        r"(?:needs|requires?|please (?:install|upgrade|update|downgrade)|you need(?: to install)?|is required|must be installed|is not installed|not found\. please install|pip install|but found|got incompatible).{0,100}(?:version|pip|install|[<>=]=|torch|transformers|peft|bitsandbytes|flash|deepspeed|ampere|compute capability|library|package|cuda)",
    ),
    raised(
        IncompatibleEnvironment,
        r"(?:ampere|hopper|turing|volta|sm_?\d+|compute capability)\b.{0,80}(?:newer|required|only|or higher|not supported|not compatible|support|at least|gpu)|only supports? (?:ampere|hopper|turing)|setup doesn't support (?:bf16|fp16)|(?:bf16|bfloat16|fp8|fp16|tf32) (?:is |mixed precision )?(?:not |only )?(?:supported|requires)|not implemented for '(?:half|bfloat16|float8\w*|char|byte)'",
    ),
    raised(
        IncompatibleEnvironment,
        r"toggled on, but it cannot be used|descriptors can ?not be created|compiled with different cuda|_array_api not found|only be used on cuda devices|unable to find an engine|attempting to deserialize object on a cuda device|unknown quantization type|flashattention only support|only tensors of floating point|no kernel found to launch|failed to find c compiler|does not recognize this architecture|model type `?\w*`? but|unrecognized configuration class|tokenizer class \w+ does not exist|is not currently imported|numpy\.dtype size changed|compiled using numpy|numpy is not available|untagged enum|binary incompatib|abi (?:mismatch|incompat)",
    ),
    raised(
        IncompatibleEnvironment,
        r"cuda ?setup|libbitsandbytes|bitsandbytes.{0,60}(?:not|without|compiled|failed)|error building extension|unable to jit load|cuda_home (?:environment variable )?(?:is not set|does not exist)|nvcc (?:fatal|not found)|no such file.{0,40}/bin/nvcc|cudamismatch|does not match the version torch was compiled|unable to compile|passmanager::run failed|ninja (?:is required|build stopped)|missingcudaexception|unsupported gpu architecture|ds_opt_adam|cadam32bit|cget_(?:managed|col_row)|cquantize|has no attribute 'c\w+_(?:fp16|bf16|fp32)",
    ),
    raised(
        IncompatibleEnvironment,
        r"(?:module|partially initialized module) '[\w.]+' has no attribute|torch\.library|could not infer schema|couldn't find.*in (?:registered|torchvision)|operator \S+ does not exist|operator torchvision::|no operator found for|weights only load failed|weightsunpickler|upgrade torch to at least|vulnerability issue in `?torch\.load|torch_npu|python version|unsupported operand type\(s\) for \|: 'type'|invalid cross-device|requires python|not supported by this (?:gpu|device|platform)|is not supported (?:on|by) (?:this|your) (?:gpu|device|platform|hardware)|has no version information|expected .{0,30}version|libc\.so|libcud(?:a|nn)|libnccl|librocm|dynamo is not supported on",
    ),
    // A checkpoint.
    raised(
        CheckpointCorrupt,
        r"pytorchstreamreader|failed finding central directory|invalid header or archive is corrupted|unexpected eof, expected|the file might be corrupted|badzipfile|not a zip (?:file|archive)|ran out of input|invalid load key|unpicklingerror|pickle data was truncated|unexpected end of (?:data|file)|storage has wrong (?:byte )?size|corrupt(?:ed)? (?:file|checkpoint|archive|zip)|checkpoint.{0,80}(?:corrupt|incomplete|truncated|damaged)|bad crc-32|bad magic number|crc (?:check|mismatch)",
    ),
    raised(
        CheckpointCorrupt,
        r"metadataincompletebuffer|headertoo(?:large|small)|invalidheader|error while deserializing|incomplete metadata|file not fully covered",
    ),
    raised(
        CheckpointCorrupt,
        r"size mismatch for|error\(s\) in loading state_dict|missing key\(s\) in state_dict|unexpected key\(s\) in state_dict|parameter group that doesn't match|different number of parameter groups|loaded state dict|state_dict.{0,40}(?:mismatch|does not match|doesn't match)",
    ),
    raised(
        CheckpointCorrupt,
        r"can't find a valid checkpoint|\d+ optimizer shards|fail(?:ed|ure) to (?:resume|load)\b.{0,60}checkpoint|keyerror: '(?:loss_scaler|optimizer_state_dict|param_groups|exp_avg)'|no valid checkpoint found|unable to load weights from (?:pytorch )?checkpoint|(?:trainer_state\.json|optimizer\.pt|scheduler\.pt|rng_state\S*\.pth|(?:zero_pp|mp)_rank_\S+|/global_step\d+|\blatest\b file).{0,80}(?:not found|no such|does not exist|missing)|(?:no such file|not found|does not exist|no file named|unable to find|can't find).{0,160}(?:checkpoint-\d+|global_step\d+|trainer_state\.json|optimizer\.pt|scheduler\.pt|unable to find latest file)",
    ),
    raised(
        CheckpointCorrupt,
        r"checkpoint.{0,60}(?:world size|dp world|was saved with)|(?:world|dp).size.{0,40}checkpoint|unable to find latest file|resum(?:e|ing).{0,60}(?:failed|error|corrupt|incomplete)",
    ),
    // A refusal of the proxy is not one of the hub.
    raised(
        Network,
        r"proxyerror|tunnel connection failed|unable to connect to proxy|cannot connect to proxy|proxy authentication|from proxy|sslerror|ssl: |certificate[_ ]verify[_ ]failed|sslcert|\bssl\b.{0,30}(?:eof|error|handshake)|tls handshake",
    ),
    // An answer of the hub is no fault of the network.
    raised(
        MissingModelOrDataset,
        r"\b(?:401|403|404|410)\b.{0,20}(?:client error|not found|unauthorized|forbidden)|http error (?:401|403|404)|invalid (?:username or password|user token)",
    ),
    // The way to a hub.
    raised(
        Network,
        r"max retries exceeded|failed to establish a new connection|name resolution|name or service not known|nodename nor servname|getaddrinfo|gaierror|nameresolutionerror|could not resolve (?:host|proxy)|no address associated with hostname|network is unreachable|\[errno (?:101|110|111|113)\]|network unreachable",
    ),
    raised(
        Network,
        r"(?:connect|read|write|pool)timeout(?:error)?\b|read timed out|connection (?:to \S+ )?timed out|timed out while|readtimeouterror|connecttimeouterror|httpx?\.\w*(?:connect|timeout|network|protocol|read)\w*|httpcore\.\w+|aiohttp\.client|client(?:connector|os|payload)error|serverdisconnected",
    ),
    raised(
        Network,
        r"remotedisconnected|remote end closed connection|incompleteread|incomplete read|chunkedencodingerror|protocolerror|connection (?:broken|aborted)|content-?length|response ended prematurely|server disconnected|peer closed connection",
    ),
    raised(
        Network,
        r"requests\.exceptions\.(?:connection|timeout|chunked|http)\w*|urllib3\.exceptions\.\w+|urllib\.error\.urlerror|couldn't connect to|could not connect to (?:the )?(?:http|hub|server|internet)|couldn't reach|cannot reach|can't reach|unable to reach|check your (?:internet )?connection|internet connection|localentrynotfound|offlinemodeisenabled|offline mode is enabled|we cannot find the requested files in the (?:local )?cache|cannot find the requested files",
    ),
    raised(
        Network,
        r"\b(?:429|500|502|503|504|520|522|524)\b.{0,30}(?:server error|client error|too many|bad gateway|gateway time|service unavailable|service temporarily|internal server)|too many requests|bad gateway|service unavailable|gateway time-?out|rate limit|http error 5\d\d|hfhubhttperror: 5",
    ),
    raised(
        Network,
        r"consistency check failed: file should be of size|file(?:integrity|download)error|download (?:failed|incomplete|interrupted)|failed to download|error downloading|integrity check failed|wandb\.(?:errors\.)?\w*commerror|fatal: unable to access|unable to access 'http|connection refused.*https?:|commerror|xet.{0,60}(?:failed|error)|reqwest|cas service error|^timeouterror: the (?:read|write|handshake)|request time(?:d )?out|http request",
    ),
    // Ranks.
    form(
        Communication,
        Form::Symptom,
        r"watchdog caught collective operation timeout|collective operations? (?:have failed or )?timed? ?out|some nccl operations have failed|watchdog (?:thread )?(?:terminated|got stuck|hang)|heartbeat monitor timed out|nccl communicator was aborted|nccl watchdog|exec_timeout|taking the entire process down|hccl.{0,80}timeout|notify.{0,20}(?:wait )?time ?out|monitoredbarrier|timed out waiting for|timeout waiting for|due to a collective timeout",
    ),
    form(
        Communication,
        Form::Symptom,
        r"(?:nccl|rccl|hccl|xccl|oneccl|mpi|ucx|gloo|processgroup\w+)(?: \w+)* ?(?:error|failure|failed)\b|nccl(?:system|internal|remote|unhandledcuda|invalidusage|invalidargument|timeout)\w*error|ncclinvalidusage|duplicate gpu detected|ncclremoteerror|nccl warn.{0,80}(?:failed|error|unable|no socket)|net/ib ?:.{0,80}error|net/socket.{0,40}(?:fail|error)|distbackenderror|\bei000[26]\b|mpi_abort",
    ),
    printed(
        Communication,
        r"address already in use|eaddrinuse|errno:? 98\b|server socket has failed to listen|client socket has (?:failed|timed out)|no available network|failed to bind|port .{0,20}(?:already )?in use|disterror|dist(?:network|store)error|rendezvous\w*(?:error|exception|timeout)|rendezvous.{0,40}(?:fail|timeout|timed out|closed)|tcpstore.{0,80}(?:fail|error|timed? ?out|broken)|socket timeout|store(?:->|\.)get\(|c10d::|init_process_group.{0,60}(?:fail|time)|initializing process group|store[ _]based[ _]barrier",
    ),
    form(
        Communication,
        Form::Echo,
        r"gloo.{0,100}(?:closed|reset|timed out|refused|connectfullmesh|unreachable)|connection closed by (?:remote )?peer|connection reset by peer|broken ?pipe|remote process exited|failed to (?:recv|send)|recvbytes|sendbytes|connectionreseterror|connectionrefusederror|no route to host|software caused connection abort",
    ),
    // Somebody stopped it.
    form(
        Interrupted,
        Form::Always,
        r"\*\*\* (?:job|step) \S+ .{0,40}cancelled|due to (?:time limit|preemption|node failure)|job (?:was )?(?:cancelled|preempted)|received sig(?:int|term|hup|usr1)|main process received sig|caught sig(?:int|term|hup)|^(?:\^c)+(?:\s|$|traceback)|exits? with return code = -(?:2|15)\b|keyboard ?interrupt",
    ),
    form(
        Interrupted,
        Form::Symptom,
        r"signalexception|got signal: ?(?:1|2|15)\b|died with <signals\.sig(?:term|int|hup)|received (?:\d+|(?:signals\.)?sig(?:term|int|hup)) death signal|^(?:terminated|hangup|aborted by user|interrupted)\s*$|killed by signal: (?:terminated|interrupt|hangup)|user (?:requested|interrupt)",
    ),
    // torchrun ends the survivors of a failed rank so.
    form(
        Interrupted,
        Form::Echo,
        r"exitcode\s*:\s*-(?:1|2|15)\b|signal (?:1|2|15) \(sig\w+\) received by pid",
    ),
    // A model or data set that is not there.
    raised(
        MissingModelOrDataset,
        r"(?:repository|revision|entry|dataset|model|gatedrepo|remoteentry)\w*(?:notfound|gated)\w*|notexist(?:error)?\b|gatedrepoerror|gated repo|access to (?:model|dataset) .{0,80}restricted|repository not found|entry not found|revision not found|repo(?:sitory)? (?:id )?.{0,80}(?:does not exist|not found|not exist)|awaiting a review|disabledrepoerror",
    ),
    raised(
        MissingModelOrDataset,
        r"not a (?:local folder|valid model identifier|valid json file)|is not (?:a )?valid (?:model|dataset) (?:id|identifier|name|path)|hfvalidationerror|repo id must|repo_id|incorrect path_or_model_id|can't load (?:the )?(?:config|configuration|tokenizer|model|feature|image|processor|weights)|does not appear to have (?:a|any) files? named|error no file named|unrecognized model in|should have a `model_type` key|unable to load vocabulary",
    ),
    raised(
        MissingModelOrDataset,
        r"couldn't find cache for|couldn't find (?:a|any|the) (?:dataset|data|module|'?config|file)|(?:dataset|data_?files?|model|path|file|directory|folder|adapter|checkpoint)\b.{0,160}(?:does(?:n't| not) exist|do not exist|not exists?\b|not found|cannot be found|could not be found|is missing)|(?:cannot|can't|could not|unable to) (?:find|locate|open) (?:the )?(?:dataset|model|file|data|adapter|config|directory|weight|safetensors|'|\x22|/)|emptydatasete|doesn't contain any data files|no (?:such )?(?:dataset|model|data files?)\b.{0,60}(?:found|exist|named)|undefined dataset|unknown dataset|dataset_info\.json",
    ),
    raised(
        MissingModelOrDataset,
        r"filenotfounderror|\[errno 2\]|no such file or directory|notadirectoryerror|\[errno 20\]|file not found",
    ),
    // The data.
    form(
        BadData,
        Form::Always,
        r"filtered dataset length: 0\b|dataset (?:is|was) empty (?:after|because)|all (?:the )?(?:training )?(?:data|rows|samples|labels|examples)\b.{0,40}(?:dropped|filtered|invalid|-100)",
    ),
    raised(
        BadData,
        r"num_samples should be a positive|^assertionerror: messages|ensure (?:that )?(?:the|your) dataset|all arrays must be of the same length|string indices must be integers|keyerror: '(?:messages|conversations?|instruction|query|response|text|input|output|content|role|from|value|images?|labels|input_ids)'|num_samples=0|dataset is empty|empty dataset|no (?:valid |training )?(?:samples|examples|rows|data) (?:left|found|remain|available)|dataset (?:contains|has) no|train(?:ing)?_?(?: )?dataset (?:is|has|requires)\b.{0,30}(?:empty|none|no rows|required)|len\(dataset\)",
    ),
    raised(
        BadData,
        r"datasetgeneration\w*error|casterror|couldn't cast|arrowinvalid|arrowtypeerror|arrownotimplemented|json parse error|failed to parse json|column names? (?:don't|do not|mismatch)|all the data files must have the same columns|schema(?: at index \d+)? was different|features (?:don't|do not|can't be) (?:match|aligned)|parsererror: error tokenizing|unicodedecodeerror|codec can't decode|error tokenizing data|column .{0,40}not in the dataset|could not convert .{0,60} to (?:numpy|arrow|int|float|double)|changed from .{0,20} to|expected bytes, got",
    ),
    raised(
        BadData,
        r"conversation roles must alternate|roles must (?:alternate|be)|maxlengtherror|n_try_fetch|failed to retrieve the dataset|unidentifiedimageerror|cannot identify image|image file is truncated|truncated (?:file|image|jpeg)|image (?:features|tokens?).{0,60}(?:match|mismatch)|mismatch in `?(?:image|video|audio)|number of (?:image|video|audio|<image>).{0,80}(?:match|not equal|!=|mismatch)|(?:invaliddataerror|invalid data found when processing)|decord|videoreader|libsndfile|soundfile|error opening .{0,80}(?:format|sound)",
    ),
    raised(
        BadData,
        r"unable to create tensor|expected sequence of length|sequence length is longer than the specified|longer than the (?:model's )?max|row .{0,40}(?:invalid|malformed|missing)|messages?.{0,40}(?:is empty|must (?:be|contain|have)|invalid|not valid|format)|invalid (?:role|message|conversation|sample|row|data format|json)|unsupported (?:data|dataset) format|does not contain (?:the )?(?:required )?(?:key|column|field)|missing (?:required )?(?:column|field|key)s?\b|each (?:sample|row|message)|labels?.{0,30}(?:out of range|negative|invalid)|(?:standard|chosen|rejected|query|response|label)_?\w* (?:is|are|cannot be|must not be) (?:none|empty|missing)",
    ),
    // The arguments.
    printed(
        BadArguments,
        r"^(?:usage: )?\S*(?:: )?error: (?:argument|unrecognized arguments|the following arguments|invalid choice|ambiguous option|no such option|one of the arguments|expected)",
    ),
    raised(
        BadArguments,
        r"remaining_argv|n_gpu: \d+, local_world_size|trainingarguments\.__init__\(\) got|(?:must|evenly) divi(?:de|sible)|but not both|you can't train a model|available choices|, supported: \[|unrecognized arguments|some (?:specified|keys are not used|.{0,20}not used by the) ?\w*arg|are not used by the hfargumentparser|unknown (?:argument|option|flag|parameter|train_type|tuner_type|command|optimizer|scheduler|lr_scheduler|loss)|unsupported (?:argument|option|train|tuner|optimizer|scheduler)|invalid (?:argument|choice|option|value for|literal for)|is not a valid (?:\w+, please select|choice|option|value|interval|scheduler|optimizer)|is not registered|no such option|missing (?:required )?argument|got multiple values for",
    ),
    raised(
        BadArguments,
        r"specified `?attn_implementation|attn_impl|please (?:use one of|set|specify|pass|provide|choose|explicitly|ensure|check your|correct the)|please \w+ (?:the )?`?--?\w+|explicitly pass|--\w+ (?:requires|must|cannot|can't|should|is (?:not|required))|`?\w+`? and `?\w+`? (?:cannot|can't|can not|are mutually exclusive|should not|must not) |mutually exclusive|cannot be (?:used|set|combined|specified) (?:with|together|at the same|when|both)|at the same time|not allowed (?:with|when|now)|is incompatible with|are incompatible|not compatible with `|only (?:be )?(?:supported|used|works?|compatible) (?:when|with|for|in|if)|(?:is|are) (?:currently )?not supported(?: (?:when|with|in|for|by|yet|\.|,)|\.?$)|does(?:n't| not) support (?:the )?(?:`|--|\w+_\w+|packing|streaming|gradient|device_map|lora|qlora|full)",
    ),
    raised(
        BadArguments,
        r"must be (?:a |an )?(?:in|one of|either|between|positive|greater|less|divisible|a multiple|set|specified|an? (?:int|float|bool|str|integer|number)|>|<|>=|<=|smaller|larger|equal|provided|the same)|should be (?:in|one of|either|between|greater|less|divisible|a multiple|positive|>|<|smaller|larger|equal)|(?:is|be) (?:not )?divisible by|not a multiple of|round multiple|expected .{0,40}(?:one of|to be in)|not in \[|does not (?:match|equal)|is not equal to|not found in the base model|target modules|target_modules|no modules were targeted|invalid device ordinal|batch size related|deepspeed ?config|config values that mismatch|mismatch trainingarguments",
    ),
    raised(
        BadArguments,
        r"load_best_model_at_end|purely quantized|attach trainable adapters|mixed using with peft|yaml\.\w+(?:\.\w+)*error|scannererror|parsererror: while|omegaconf\.|hydra\.|pydantic.{0,40}validation|validationerror|validation errors? for|argparse|cuda_visible_devices|configattributeerror|missingmandatory|you (?:must|have to|cannot|can't|should) (?:set|specify|provide|pass|use|define|not)|either .{0,80} or .{0,80}(?:must|should|is required|has to)|one of .{0,80}(?:must|should) be|neither|value for .{0,40}(?:invalid|not)|out of range for|dispatched on the cpu or the disk|offload_(?:dir|folder)",
    ),
    // A bug, or a limit of the code.
    printed(
        CodeError,
        r"segmentation fault|signal 11 \(sigsegv\)|exitcode\s*:\s*-(?:11|4|8)\b|fatal python error: (?:segmentation|aborted|illegal)|killed by signal: (?:segmentation fault|aborted|illegal)|illegal instruction \(core|double free|corrupted (?:size|double-linked|unsorted)|stack smashing|munmap_chunk|free\(\): invalid|recursionerror",
    ),
    // Deaths whose reason nobody prints.
    form(
        HostOom,
        Form::Kill,
        r"exit ?code\s*[:=]?\s*-9\b|return ?code\s*=?\s*-9\b|signal 9\b|sigkill\)|signal sigkill\b|signals\.sigkill|exit(?:ed)?(?: with)?(?: status| code)? 137\b|status 137\b|exited with (?:signal|code) 9\b|^(?:\[\d+\]\s+)?(?:\S+: line \d+:\s+\d+ )?killed\b(?:\s+(?:python|swift|torchrun|accelerate|deepspeed|bash|sh|cuda|\S*=|\S+/).*|\s*\(core.*|\s*)$|child process .{0,40}was killed",
    ),
    form(
        HostOom,
        Form::Symptom,
        r"dataloader worker \(pid\(?s?\)? [\d, ]+\) exited unexpectedly|worker .{0,40}(?:died|exited) unexpectedly",
    ),
];

static FILTER: LazyLock<Filter> =
    LazyLock::new(|| Filter::new(SIGNATURES.iter().map(|signature| signature.pattern)));

/// Returns the signatures that match a line, in the order of their precedence.
pub(super) fn matches(text: &str) -> impl Iterator<Item = &'static Signature> {
    FILTER.matches(text).into_iter().map(|index| &SIGNATURES[index])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::{any, proptest};
    use proptest::sample::Index;
    use proptest::strategy::{Strategy, ValueTree};
    use proptest::test_runner::TestRunner;
    use regex::bytes::{Regex, RegexBuilder};
    use regex_syntax::hir::{Hir, HirKind, Repetition};

    fn kind(text: &str) -> Option<Kind> {
        matches(text).next().map(|signature| signature.kind)
    }

    /// Every pattern as it is written, tried on every line.
    static ALONE: LazyLock<Vec<Regex>> = LazyLock::new(|| {
        let alone = |signature: &Signature| {
            RegexBuilder::new(signature.pattern).case_insensitive(true).unicode(false).build().unwrap()
        };
        SIGNATURES.iter().map(alone).collect()
    });

    #[track_caller]
    fn assert_nothing_is_dropped(line: &str) {
        let alone: Vec<usize> =
            (0..SIGNATURES.len()).filter(|&at| ALONE[at].is_match(line.as_bytes())).collect();
        assert_eq!(FILTER.matches(line), alone, "{line:?}");
    }

    /// Returns a pattern that generates what `hir` matches but for its anchors, which proptest cannot generate.
    fn without_anchors(hir: &Hir) -> Hir {
        match hir.kind() {
            HirKind::Look(_) => Hir::empty(),
            HirKind::Capture(capture) => without_anchors(&capture.sub),
            HirKind::Concat(parts) => Hir::concat(parts.iter().map(without_anchors).collect()),
            HirKind::Alternation(branches) => {
                Hir::alternation(branches.iter().map(without_anchors).collect())
            }
            HirKind::Repetition(repetition) => Hir::repetition(Repetition {
                // More of the same says nothing more.
                max: Some(repetition.max.unwrap_or(u32::MAX).min(repetition.min + 4)),
                sub: Box::new(without_anchors(&repetition.sub)),
                ..*repetition
            }),
            HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) => hir.clone(),
        }
    }

    #[test]
    fn what_the_patterns_themselves_generate_is_found_as_by_each_alone() {
        let mut runner = TestRunner::deterministic();
        let mut found = 0;
        for (at, signature) in SIGNATURES.iter().enumerate() {
            let hir = without_anchors(&regex_syntax::parse(signature.pattern).unwrap());
            let lines = proptest::string::string_regex(&hir.to_string()).unwrap();
            for _ in 0..12 {
                let line = lines.new_tree(&mut runner).unwrap().current();
                for line in [line.to_uppercase(), format!("[rank0]: {line} x"), line] {
                    assert_nothing_is_dropped(&line);
                    found += usize::from(FILTER.matches(&line).contains(&at));
                }
            }
        }
        // The others need an anchor that is not there.
        assert!(found > SIGNATURES.len() * 24, "only {found} lines match what they were made of");
    }

    proptest! {
        #[test]
        fn pieces_of_logs_are_found_as_by_each_pattern_alone(
            pieces in vec((any::<Index>(), any::<Index>(), any::<Index>(), any::<bool>(), "\\PC{0,3}"), 1..4),
        ) {
            let rows: Vec<&str> = include_str!("../../tests/fixtures/wordings.txt")
                .lines()
                .filter_map(|row| Some(row.split_once('\t')?.1))
                .collect();
            let mut line = String::new();
            for (row, from, to, is_loud, glue) in pieces {
                let row: Vec<char> = row.get(&rows).chars().collect();
                let (from, to) = (from.index(row.len() + 1), to.index(row.len() + 1));
                let piece: String = row[from.min(to)..from.max(to)].iter().collect();
                line.push_str(&if is_loud { piece.to_uppercase() } else { piece });
                line.push_str(&glue);
            }
            assert_nothing_is_dropped(&line);
        }
    }

    /// One automaton for all wordings read 0.2 MB/s of sentences: what is tried has to stay little.
    #[test]
    fn hardly_any_wording_is_tried_on_an_ordinary_line() {
        for (line, most) in [
            ("", 0),
            ("Train:  10%|#         | 3/30 [00:09<01:21,  3.0s/it]", 0),
            ("[INFO:swift] Setting torch_dtype: torch.bfloat16", 2),
            ("{'loss': 1.5, 'grad_norm': 0.5, 'learning_rate': 1e-4, 'token_acc': 0.5, 'epoch': 0.1}", 6),
            ("the model is read from a file on the server and its data is kept in memory of the device", 24),
        ] {
            let (tried, all) = FILTER.tried(line);
            assert!(tried <= most && all > 700, "{tried} of {all}: {line}");
        }
    }

    #[test]
    fn look_alikes_of_memory_are_not_the_cards_memory() {
        let cases = [
            (
                "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 2",
                IncompatibleEnvironment,
            ),
            ("ImportError: x.so: cannot allocate memory in static TLS block", IncompatibleEnvironment),
            ("RuntimeError: CUDA driver error: invalid argument", CodeError),
            ("java.lang.OutOfMemoryError: Java heap space", HostOom),
            (
                "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory",
                HostOom,
            ),
            (
                "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's \
              workers are out of shared memory. Please try to raise your shared memory limit.",
                HostOom,
            ),
            (
                "RuntimeError: [enforce fail at alloc_cpu.cpp:83] . DefaultCPUAllocator: can't allocate memory: you tried \
              to allocate 123 bytes. Error code 12 (Cannot allocate memory)",
                HostOom,
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(kind(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn every_way_to_say_device_memory_is_known() {
        for text in [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "RuntimeError: CUDA error: out of memory",
            "torch.AcceleratorError: CUDA error: out of memory",
            "RuntimeError: CUDA driver error: out of memory",
            "RuntimeError: Triton Error [CUDA]: out of memory",
            "RuntimeError: cuda runtime error (2) : out of memory at /pytorch/x.cu:58",
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "Cuda failure 2 'out of memory'",
            "Cuda failure 'out of memory'",
            "RuntimeError: HIP error: out of memory",
            "RuntimeError: XPU out of memory, please use `empty_cache` to release all unoccupied cached memory.",
            "RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB",
            "RuntimeError: level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
            "Error out of memory at line 380 in file /x/ops.cu",
            "RuntimeError: No executable batch size found, reached zero.",
            "CUDA Error: out of memory at x.cpp:1",
            "RuntimeError: MPS backend out of memory (MPS allocated: 1 GB)",
            "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 512 bytes",
        ] {
            assert_eq!(kind(text), Some(DeviceOom), "{text}");
        }
    }

    #[test]
    fn advice_about_memory_is_no_shortage() {
        for text in [
            "max_pixels can be lowered to avoid out of memory",
            "Set it to reduce the risk of OOM.",
            "GPU memory almost full: free 0.31GiB",
            "'pin_memory' argument is set as true but no accelerator is found",
        ] {
            assert!(!matches(text).any(|s| s.kind == DeviceOom || s.kind == HostOom), "{text}");
        }
    }
}
