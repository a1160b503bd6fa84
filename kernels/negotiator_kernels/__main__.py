from negotiator_kernels.availability import backends

for backend in backends():
    print(f"{backend.name:8}{backend.device:6}{'on' if backend.on else 'off':5}{backend.detail}")
